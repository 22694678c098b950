"""Quantized weights load as `stored * scale`, rounded once; invalid scales are refused."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jfp8kv.checkpoint import load
from jfp8kv.checkpoint.quantized import dequantize
from jfp8kv.checkpoint.safetensors import open_safetensors
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.params import Params
from jfp8kv.models.quantization import weight_scheme

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
UP = "model.layers.1.mlp.up_proj.weight"


def compressed(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": FP8 | weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


# The scheme, the suffix of the scale's name, rows and columns of a block, and the scale's shape.
SCHEMES = {
    "compressed tensor": (
        compressed(strategy="tensor"),
        "_scale",
        (999, 999),
        lambda grid: grid.reshape(1),
    ),
    "compressed channel": (compressed(strategy="channel"), "_scale", (1, 999), lambda grid: grid),
    "compressed group": (
        compressed(strategy="group", group_size=16),
        "_scale",
        (1, 16),
        lambda grid: grid,
    ),
    "compressed block": (
        compressed(strategy="block", block_structure=[24, 16]),
        "_scale",
        (24, 16),
        lambda grid: grid,
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "_scale",
        (999, 999),
        lambda grid: grid.reshape(()),
    ),
    "modelopt channel": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "_scale",
        (1, 999),
        lambda grid: grid.reshape(-1),
    ),
    "autofp8": ({"quant_method": "fp8"}, "_scale", (999, 999), lambda grid: grid.reshape(())),
    "fp8 tensor": (
        {"quant_method": "fp8"},
        "_scale_inv",
        (999, 999),
        lambda grid: grid.reshape(()),
    ),
    "fp8 block": (
        {"quant_method": "fp8", "weight_block_size": [24, 16]},
        "_scale_inv",
        (24, 16),
        lambda grid: grid,
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "_scale", (1, 999), lambda grid: grid),
}
# Values are checked while weights are read, after the warning that they are dequantized.
ignore_dequantized_warning = pytest.mark.filterwarnings(
    "ignore:.*quantized weights.*are dequantized"
)
each_scheme = pytest.mark.parametrize("kind", SCHEMES)


def codes(shape, dtype, random):
    """Return every finite code of a float8 dtype at least once, in random places."""
    finite = np.arange(256, dtype=np.uint8)
    finite = finite[np.isfinite(finite.view(dtype).astype(np.float32))]
    some = np.concatenate([finite, random.choice(finite, math.prod(shape) - len(finite))])
    return random.permutation(some).reshape(shape).view(dtype)


def dequantized_by_element(q, grid, block):
    """Compute `stored * scale`, one element at a time, in float32."""
    out = np.empty(q.shape, np.float32)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            out[i, j] = np.float32(q[i, j]) * np.float32(grid[i // block[0], j // block[1]])
    return out


def quantize(tensors, kind, dtype=E4M3, scale_dtype=np.float32):
    """Return weights with random codes and scales as tools write them, and their real values."""
    _, end, block, shaped = SCHEMES[kind]
    random = np.random.default_rng(0)
    stored, real = {}, {}
    for name, weight in tensors.items():
        stored[name], real[name] = weight, weight.astype(np.float32)
        if "_proj" in name:
            rows, columns = weight.shape
            grid = random.uniform(
                0.001, 0.1, (-(-rows // block[0]), -(-columns // block[1]))
            ).astype(scale_dtype)
            stored[name] = codes(weight.shape, dtype, random)
            stored[name + end] = shaped(grid)
            stored[name.replace("weight", "input_scale")] = np.ones(1, np.float32)
            real[name] = dequantized_by_element(stored[name], grid, block)
    return stored, real


def config_of(tiny, kind, **changes):
    """Return a config whose sizes no block divides: 40 columns, 64 and 72 rows."""
    return tiny.config(
        hidden_size=40,
        intermediate_size=72,
        torch_dtype="bfloat16",
        quantization_config=SCHEMES[kind][0],
        **changes,
    )


def load_dequantized(folder, **options):
    with pytest.warns(UserWarning, match="14 quantized weights"):
        return load(folder, **options)


def equal(params, tensors, config, dtype):
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    expected = Params.from_pytree(
        {name: tensor.astype(dtype) for name, tensor in tensors.items()}, plain
    )
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), params.tree, expected.tree
    )
    return jax.tree.all(same)


@each_scheme
@pytest.mark.parametrize("dtype_given", [None, "float32", "float16"])
def test_every_element_is_code_times_scale_rounded_once(
    tiny, tmp_path, kind, dtype_given, monkeypatch
):
    monkeypatch.setattr(
        "jfp8kv.checkpoint.tensors.CHUNK_BYTES", 1000
    )  # a few rows, not whole blocks
    config = config_of(tiny, kind)
    stored, real = quantize(tiny.tensors(config, BF16), kind)
    params = load_dequantized(tiny.folder(tmp_path, config, stored, shards=2), dtype=dtype_given)
    assert equal(params, real, config, dtype_given or BF16)
    assert params.config.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale_dtype", [np.float32, BF16, np.float16])
def test_both_float8_formats_and_every_float_scale_are_read(tiny, tmp_path, dtype, scale_dtype):
    config = config_of(tiny, "fp8 block")
    stored, real = quantize(tiny.tensors(config, BF16), "fp8 block", dtype, scale_dtype)
    assert equal(load_dequantized(tiny.folder(tmp_path, config, stored)), real, config, BF16)


def test_e8m0_scales_are_powers_of_two(tiny, tmp_path):
    config = config_of(tiny, "fp8 block")
    stored, _ = quantize(tiny.tensors(config, BF16), "fp8 block")
    e8m0 = {
        n: t.astype(ml_dtypes.float8_e8m0fnu) if n.endswith("_inv") else t
        for n, t in stored.items()
    }
    powers = {n: e8m0[n].astype(np.float32) if n.endswith("_inv") else t for n, t in stored.items()}
    left, right = (
        load_dequantized(tiny.folder(tmp_path / str(i), config, t))
        for i, t in enumerate((e8m0, powers))
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left.tree, right.tree))


def test_the_warning_has_scheme_count_and_dtype(tiny, tmp_path):
    config = config_of(tiny, "fp8 block")
    stored, _ = quantize(tiny.tensors(config, BF16), "fp8 block")
    folder = tiny.folder(tmp_path, config, stored)
    warning = (
        r"14 quantized weights \(fp8: FP8, a scale per block of 24 x 16\) "
        "are dequantized to {}, {} bytes"
    )
    with pytest.warns(UserWarning, match=warning.format("bfloat16", 2)):
        load(folder)
    with pytest.warns(UserWarning, match=warning.format("float32", 4)):
        load(folder, dtype="float32")


def test_a_scheme_without_quantized_weights_gives_a_warning(tiny, tmp_path):
    config = config_of(tiny, "modelopt")
    with pytest.warns(
        UserWarning, match=r"declares quantized weights \(modelopt.*but no weight is"
    ):
        assert load(tiny.folder(tmp_path, config, tiny.tensors(config, BF16))).dtype == BF16


def test_layers_that_the_config_ignores_are_not_dequantized(tiny, tmp_path):
    config = config_of(tiny, "compressed channel")
    plain = tiny.tensors(config, BF16)
    stored, real = quantize(plain, "compressed channel")
    stored[UP], real[UP] = plain[UP], plain[UP].astype(np.float32)
    del stored[UP + "_scale"]
    with pytest.warns(UserWarning, match="13 quantized weights"):
        assert equal(load(tiny.folder(tmp_path, config, stored)), real, config, BF16)


def test_hf_quant_config_of_modelopt_declares_quantized_weights(tiny, tmp_path):
    config = config_of(tiny, "modelopt")
    stored, real = quantize(tiny.tensors(config, BF16), "modelopt")
    del config["quantization_config"]
    folder = tiny.folder(tmp_path, config, stored)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert equal(load_dequantized(folder), real, config, BF16)


def test_compression_config_is_read_as_quantization_config(tiny, tmp_path):
    config = config_of(tiny, "compressed channel")
    stored, real = quantize(tiny.tensors(config, BF16), "compressed channel")
    config["compression_config"] = config.pop("quantization_config")
    assert equal(load_dequantized(tiny.folder(tmp_path, config, stored)), real, config, BF16)


def test_kv_scales_are_not_taken_for_weight_scales(tiny, tmp_path):
    config = config_of(tiny, "modelopt")
    stored, real = quantize(tiny.tensors(config, BF16), "modelopt")
    for layer in range(2):
        stored |= {
            f"model.layers.{layer}.self_attn.{n}_proj.{n}_scale": np.ones((), np.float32)
            for n in "kv"
        }
    with pytest.warns(UserWarning, match="declares no FP8 cache"):
        params = load_dequantized(tiny.folder(tmp_path, config, stored))
    assert equal(params, real, config, BF16) and (params.kv_scales.k == 1).all()


def test_zero_points_must_be_zero(tiny, tmp_path):
    config = config_of(tiny, "compressed channel")
    stored, real = quantize(tiny.tensors(config, BF16), "compressed channel")
    stored[UP + "_zero_point"] = np.zeros(72, E4M3)
    assert equal(load_dequantized(tiny.folder(tmp_path / "a", config, stored)), real, config, BF16)
    stored[UP + "_zero_point"] = np.ones(72, E4M3)
    refused(tiny.folder(tmp_path / "b", config, stored), UP + "_zero_point", "asymmetric")


def refused(folder, *named):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert all(part in str(error.value) for part in named), error.value


def edited(tiny, tmp_path, kind, edit):
    config = config_of(tiny, kind)
    stored, _ = quantize(tiny.tensors(config, BF16), kind)
    edit(stored)
    return tiny.folder(tmp_path, config, stored)


def test_a_missing_weight_scale_is_refused(tiny, tmp_path):
    refused(
        edited(tiny, tmp_path, "modelopt", lambda t: t.pop(UP + "_scale")),
        UP,
        "no scale",
        UP + "_scale",
    )


def test_two_scales_for_one_weight_are_refused(tiny, tmp_path):
    more = {UP + "_scale_inv": np.ones((), np.float32)}
    refused(edited(tiny, tmp_path, "autofp8", lambda t: t.update(more)), UP, "two scales")


@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_a_scale_without_a_quantized_weight_is_refused(tiny, tmp_path, end):
    name = "lm_head.weight" + end
    refused(
        edited(tiny, tmp_path, "modelopt", lambda t: t.update({name: np.ones((), np.float32)})),
        name,
        "not quantized",
    )


@ignore_dequantized_warning
@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf])
@pytest.mark.parametrize("kind", ["modelopt", "compressed channel", "fp8 block"])
def test_a_scale_that_is_not_positive_and_finite_is_refused(tiny, tmp_path, kind, value):
    name = UP + SCHEMES[kind][1]
    refused(
        edited(tiny, tmp_path, kind, lambda t: t[name].reshape(-1)[-1:].fill(value)),
        name,
        f"is {value}",
        "positive",
    )


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("modelopt", (72, 1), "[1, 1]"),
        ("compressed tensor", (2,), "[1, 1]"),
        ("compressed channel", (1,), "[72, 1] or [72]"),
        ("compressed channel", (71, 1), "[72, 1] or [72]"),
        ("compressed group", (72, 2), "[72, 3]"),
        ("fp8 block", (3, 2), "[3, 3]"),
        ("fp8 block", (9,), "[3, 3]"),
    ],
)
def test_a_scale_of_the_wrong_shape_is_refused_with_the_allowed_shapes(
    tiny, tmp_path, kind, shape, expected
):
    name = UP + SCHEMES[kind][1]
    folder = edited(tiny, tmp_path, kind, lambda t: t.update({name: np.ones(shape, np.float32)}))
    refused(folder, name, str(list(shape)), "[72, 40]", expected)


def test_an_integer_scale_is_refused(tiny, tmp_path):
    folder = edited(
        tiny, tmp_path, "modelopt", lambda t: t.update({UP + "_scale": np.ones((), np.uint8)})
    )
    refused(folder, UP + "_scale is stored as U8")


@ignore_dequantized_warning
@pytest.mark.parametrize(
    ("dtype", "code"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0xFE)]
)
def test_codes_of_nan_and_infinity_are_refused(tiny, tmp_path, dtype, code):
    config = config_of(tiny, "fp8 block")
    stored, _ = quantize(tiny.tensors(config, BF16), "fp8 block", dtype)
    stored[UP].view(np.uint8)[71, 39] = code
    refused(tiny.folder(tmp_path, config, stored), UP, "NaN or infinity")


@ignore_dequantized_warning
def test_dequantized_values_out_of_range_are_refused_by_name(tiny, tmp_path):
    config = config_of(tiny, "modelopt") | {"torch_dtype": "float16"}
    stored, _ = quantize(tiny.tensors(config, np.float16), "modelopt")
    stored[UP + "_scale"] = np.full((), 200, np.float32)
    refused(
        tiny.folder(tmp_path, config, stored),
        UP,
        "exceeds float16's largest value, 65504",
        "bfloat16",
    )


def test_undeclared_float8_weights_are_refused(tiny, tmp_path):
    config = config_of(tiny, "modelopt")
    stored, _ = quantize(tiny.tensors(config, BF16), "modelopt")
    del config["quantization_config"]
    refused(tiny.folder(tmp_path, config, stored), "proj.weight is stored as F8_E4M3")


def test_an_unsupported_quantization_method_is_refused_by_name(tiny, tmp_path):
    config = tiny.config(quantization_config={"quant_method": "gptq", "bits": 4})
    refused(tiny.folder(tmp_path, config, tiny.tensors(config)), "gptq", "compressed-tensors")


EXPERTS = "model.layers.0.mlp.experts."
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def read_file(path, tensors, quantization, dtype):
    """Write tensors to a file and read them back, dequantized to `dtype`."""
    safetensors.numpy.save_file(tensors, path)
    found = dequantize(open_safetensors(path), weight_scheme(quantization), np.dtype(dtype))
    out = {name: np.empty(tensor.shape, dtype) for name, tensor in found.items()}
    for name, tensor in found.items():
        tensor.read_into(out[name])
    return out


def mxfp4(experts=3, rows=10, groups=4):
    random = np.random.default_rng(1)
    return {
        EXPERTS + "gate_up_proj_blocks": random.integers(
            0, 256, (experts, rows, groups, 16), np.uint8
        ),
        EXPERTS + "gate_up_proj_scales": random.integers(
            100, 140, (experts, rows, groups), np.uint8
        ),
        EXPERTS + "gate_up_proj_bias": np.ones((experts, rows), np.float32),
    }


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_mxfp4_experts_have_the_layout_of_the_bfloat16_checkpoint(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("jfp8kv.checkpoint.tensors.CHUNK_BYTES", 2048)  # four of the ten rows
    tensors = mxfp4()
    blocks, scales = (tensors[EXPERTS + "gate_up_proj" + end] for end in ("_blocks", "_scales"))
    expected = np.empty((3, 4 * 32, 10), dtype)
    for expert, row, group, byte in np.ndindex(3, 10, 4, 16):
        code = int(blocks[expert, row, group, byte])
        power = 2.0 ** (int(scales[expert, row, group]) - 127)
        for half, nibble in enumerate((code & 15, code >> 4)):
            value = E2M1[nibble & 7] * (-1 if nibble & 8 else 1)
            expected[expert, group * 32 + 2 * byte + half, row] = value * power
    found = read_file(tmp_path / "a.safetensors", tensors, {"quant_method": "mxfp4"}, dtype)
    assert set(found) == {EXPERTS + "gate_up_proj", EXPERTS + "gate_up_proj_bias"}
    np.testing.assert_array_equal(found[EXPERTS + "gate_up_proj"], expected)
    assert (found[EXPERTS + "gate_up_proj_bias"] == 1).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_scales": None}, ["gate_up_proj_blocks has no", "gate_up_proj_scales"]),
        ({"_blocks": None}, ["gate_up_proj_scales has no", "gate_up_proj_blocks"]),
        (
            {"_scales": np.zeros((3, 10, 3), np.uint8)},
            ["gate_up_proj_scales U8 [3, 10, 3]", "[3, 10, 4]"],
        ),
        (
            {"_blocks": np.zeros((3, 10, 64), np.uint8)},
            ["gate_up_proj_blocks U8 [3, 10, 64]", "[experts, rows, groups, 16]"],
        ),
        (
            {"_scales": np.full((3, 10, 4), 255, np.uint8)},
            ["gate_up_proj_scales contains 255", "NaN"],
        ),
        (
            {"_scales": np.full((3, 10, 4), 254, np.uint8)},
            ["gate_up_proj_blocks", "exceeds bfloat16's largest value"],
        ),
    ],
)
def test_damaged_mxfp4_experts_are_refused(tmp_path, change, named):
    tensors = mxfp4() | {EXPERTS + "gate_up_proj" + end: value for end, value in change.items()}
    with pytest.raises(CheckpointError) as error:
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        read_file(tmp_path / "a.safetensors", tensors, {"quant_method": "mxfp4"}, BF16)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("block", "shape"), [((24, 16), (3, 2, 3)), (None, (3,)), (None, (3, 1, 1))]
)
def test_each_stacked_expert_has_its_grid_of_scales(tmp_path, block, shape, monkeypatch):
    monkeypatch.setattr(
        "jfp8kv.checkpoint.tensors.CHUNK_BYTES", 5000
    )  # chunks end inside an expert
    random = np.random.default_rng(2)
    q = codes((3, 40, 40), E4M3, random)
    scales = random.uniform(0.5, 2, shape).astype(np.float32)
    tensors = {"experts.gate_up_proj": q, "experts.gate_up_proj_scale_inv": scales}
    tensors |= {"experts.gate_up_proj_activation_scale": np.ones(3, np.float32)}
    found = read_file(
        tmp_path / "a.safetensors",
        tensors,
        {"quant_method": "fp8", "weight_block_size": block},
        np.float32,
    )
    grids = scales.reshape(3, *(shape[1:] if block else (1, 1)))
    for expert in range(3):
        np.testing.assert_array_equal(
            found["experts.gate_up_proj"][expert],
            dequantized_by_element(q[expert], grids[expert], block or (40, 40)),
        )
    assert list(found) == ["experts.gate_up_proj"]
