"""KV scales of every naming convention are read by layer; invalid ones are refused or replaced."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jfp8kv.checkpoint import kv_scale_tensors, load
from jfp8kv.checkpoint import safetensors as reader
from jfp8kv.checkpoint.load import read_scale_report
from jfp8kv.core.errors import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYOUTS = [
    "compressed-tensors",
    "ModelOpt",
    "Quark",
    "fused",
    "attention",
    "cache",
    "module",
    "mixer",
    "AutoFP8",
]
LAYER = "model.layers.{}.self_attn."
K1, V1 = LAYER.format(1) + "k_scale", LAYER.format(1) + "v_scale"


def numbers(*shape):
    return np.random.default_rng(0).uniform(0.01, 2, shape).astype(np.float32)


def folder_of(tiny, path, layout="compressed-tensors", more=None, **config):
    """Write a model of two layers, with the tensors `more`."""
    config = tiny.config(**({"quantization_config": tiny.scale_layouts[layout][2]} | config))
    return tiny.folder(path, config, tiny.tensors(config) | (more or {}))


def only_scales(tiny, path, scales, layout="compressed-tensors", **config):
    """Write the same folder with only the tensors `scales`."""
    return tiny.folder(
        path,
        tiny.config(**({"quantization_config": tiny.scale_layouts[layout][2]} | config)),
        scales,
    )


def refused(folder, *named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError) as error:
            load(folder)
    assert all(part in str(error.value) for part in (str(folder), *named)), error.value


# Names, shapes, dtypes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, BF16, np.float64], ids=["f32", "f16", "bf16", "f64"]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (2,), (2, 1, 1), (1, 2, 1, 1)], ids=str)
def test_every_convention_dtype_and_shape_gives_its_values_by_layer(
    tiny, tmp_path, layout, dtype, shape
):
    heads = max((1, *shape))
    k, v = numbers(2, 2, heads)
    v = k if layout == "AutoFP8" else v
    scales = read_scale_report(
        only_scales(tiny, tmp_path, tiny.scales(layout, k, v, dtype, shape), layout)
    ).scales
    assert scales.k.shape == scales.v.shape == (2, heads, 1) and scales.k.dtype == np.float32
    for layer, head in np.ndindex(2, heads):
        assert scales.k[layer, head, 0] == np.float32(k[layer, head].astype(dtype))
        assert scales.v[layer, head, 0] == np.float32(v[layer, head].astype(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_is_loaded_with_its_scales(tiny, tmp_path, layout):
    k, v = numbers(2, 2)
    v = k if layout == "AutoFP8" else v
    params = load(folder_of(tiny, tmp_path, layout, tiny.scales(layout, k, v)))
    assert params.config.kv_cache_dtype == "fp8_e4m3" and params.kv_scales.granularity == "tensor"
    assert np.array_equal(params.kv_scales.k.ravel(), k) and np.array_equal(
        params.kv_scales.v.ravel(), v
    )


def test_granularity_may_differ_between_layers_and_between_keys_and_values(tiny, tmp_path):
    tensors = tiny.scales("ModelOpt", [[0.5, 0.25], [2.0]], [[1.0], [4.0]])
    found = read_scale_report(only_scales(tiny, tmp_path, tensors, "ModelOpt"))
    assert found.scales.k[..., 0].tolist() == [
        [0.5, 0.25],
        [2, 2],
    ] and found.scales.v.ravel().tolist() == [1, 4]
    assert [layer.granularity for layer in found.layers] == ["head", "tensor"]


@pytest.mark.parametrize(
    "at",
    ["model.layers.", "layers.", "model.language_model.layers.", "language_model.model.layers."],
)
def test_the_layer_number_of_a_scale_does_not_depend_on_the_prefix(tiny, tmp_path, at):
    k, v = numbers(2, 12)
    folder = only_scales(
        tiny, tmp_path, tiny.scales("compressed-tensors", k, v, at=at), num_hidden_layers=12
    )
    scales = read_scale_report(folder).scales
    assert scales.k.ravel().tolist() == k.tolist() and scales.v.ravel().tolist() == v.tolist()


def test_a_model_of_one_layer_has_scales(tiny, tmp_path):
    folder = only_scales(
        tiny, tmp_path, tiny.scales("Quark", [0.5], [0.25]), "Quark", num_hidden_layers=1
    )
    assert read_scale_report(folder).scales.k.tolist() == [[[0.5]]]


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = MIXTRAL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("architecture", "expert_scale", "more"),
    [
        ("MixtralForCausalLM", "block_sparse_moe.experts.0.w1.weight_scale", MIXTRAL),
        ("GptOssForCausalLM", "mlp.experts.down_proj_scales", GPT_OSS),
    ],
)
def test_scales_of_experts_are_not_taken_for_kv_scales(
    tiny, tmp_path, architecture, expert_scale, more
):
    tensors = tiny.scales("ModelOpt", [0.5, 2.0], [1.0, 4.0]) | {
        f"model.layers.0.{expert_scale}": np.zeros(3, np.float32)
    }
    config = {"architectures": [architecture], "model_type": None, "rope_scaling": None} | more
    found = read_scale_report(only_scales(tiny, tmp_path, tensors, "ModelOpt", **config))
    assert found.scales.k.ravel().tolist() == [0.5, 2] and found.issues == ()


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("transformer.h.11.attn.k_scale", 11, "k"),
        ("backbone.layers.3.mixer.v_proj.v_scale", 3, "v"),
        ("model.layers.10.self_attn.qkqkv_proj.k_scale", 10, "k"),
        ("model.layers.2.self_attn.attn.kv_scale", 2, "kv"),
        ("model.layers.2.self_attn.attn.prob_scale", 2, "prob"),
        ("model.layers.2.self_attn.q.scale", 2, "q"),
    ],
)
def test_a_scale_name_gives_layer_and_part(name, layer, part):
    found = kv_scale_tensors.parse_scale_name(name)
    assert (found.layer, found.part, found.is_zero_point) == (layer, part, False)
    point = kv_scale_tensors.parse_scale_name(f"{name.removesuffix('scale')}zero_point")
    assert (point.layer, point.part, point.is_zero_point) == (layer, part, True)


def test_scales_of_a_vision_encoder_are_ignored(tiny, tmp_path):
    tensors = tiny.scales("compressed-tensors", [0.5, 2.0], [1.0, 4.0])
    seeing = {
        f"model.vision_tower.encoder.{name.removeprefix('model.')}": np.asarray(tensor * 3)
        for name, tensor in tensors.items()
    }
    found = read_scale_report(only_scales(tiny, tmp_path, tensors | seeing))
    assert found.scales.k.ravel().tolist() == [0.5, 2] and found.issues == ()


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.weight",
        "k_proj.weight_scale",
        "k_proj.weight_scale_inv",
        "v_proj.input_scale",
        "k_norm.weight",
        "q_norm.scale",
    ],
)
def test_weights_and_their_scales_are_not_kv_scales(name):
    assert not kv_scale_tensors.is_kv_scale(LAYER.format(0) + name)


def test_reading_scales_does_not_read_weights(tiny, tmp_path, monkeypatch):
    folder, sizes = (
        folder_of(tiny, tmp_path, more=tiny.scales("compressed-tensors", *numbers(2, 2))),
        [],
    )
    real = reader.read_exactly
    monkeypatch.setattr(
        reader,
        "read_exactly",
        lambda path, at, out: (sizes.append(out.nbytes), real(path, at, out)),
    )
    assert read_scale_report(folder).scales is not None and sum(sizes) == 4 * 4


# The report


def test_the_report_has_an_entry_for_each_layer(tiny, tmp_path):
    tensors = tiny.scales("compressed-tensors", [0.5, np.nan], [[0.25, 1.0], [2.0]])
    first, second = read_scale_report(only_scales(tiny, tmp_path, tensors)).layers
    assert (first.k.tolist(), first.v.tolist(), first.granularity, first.issues) == (
        0.5,
        [0.25, 1],
        "head",
        (),
    )
    assert [scale.source for scale in first.used] == [
        LAYER.format(0) + "k_scale",
        LAYER.format(0) + "v_scale",
    ]
    assert (second.k.tolist(), second.v.tolist(), second.granularity) == (1, 2, "tensor")
    assert ([s.source for s in second.stored], [s.source for s in second.used]) == ([K1, V1], [V1])
    what = "is nan: a scale must be positive and finite"
    assert second.issues == ((1, K1, what, "scale 1 is used instead"),)


def test_query_and_probability_scales_are_reported_but_not_used(tiny, tmp_path):
    tensors = tiny.scales("Quark", [0.5, 2.0], [1.0, 4.0])
    tensors |= {
        LAYER.format(0) + "q_proj.output_scale": np.ones(4, BF16),
        LAYER.format(1) + "prob_output_scale": np.float32([3]),
    }
    found = read_scale_report(only_scales(tiny, tmp_path, tensors, "Quark"))
    assert [(s.layer, s.part, s.stored_dtype, s.granularity) for s in found.other_scales] == [
        (0, "q", "BF16", "head"),
        (1, "prob", "F32", "tensor"),
    ]
    assert found.issues == () and found.scales.k.ravel().tolist() == [0.5, 2]


def test_a_model_without_scales_has_an_empty_report(tiny, tmp_path):
    found = read_scale_report(folder_of(tiny, tmp_path, quantization_config=None))
    assert found.layers == () and found.scales is None and found.issues == found.notes == ()
    config = tiny.config()
    assert (
        read_scale_report(tiny.gguf(tmp_path / "model.gguf", config, tiny.tensors(config))).layers
        == ()
    )


# Invalid scales


def edits(tiny):
    """By case: edits of valid scales, parts of the error, and the scales of K and V in layer 1."""
    k0 = LAYER.format(0) + "k_scale"
    return {
        "zero": ({K1: np.float32([0])}, [K1, "is 0", "positive and finite"], (1, 4)),
        "negative": ({V1: np.float32([-2])}, [V1, "is -2"], (2, 1)),
        "nan": ({K1: np.float32([np.nan])}, [K1, "is nan"], (1, 4)),
        "infinite": ({V1: np.float32([np.inf])}, [V1, "is inf"], (2, 1)),
        "one head": ({K1: np.float32([1, 0])}, [K1, "is 0 for head 1"], (1, 4)),
        "too small": ({K1: np.float32([1e-36])}, [K1, "is 1e-36", "must lie between"], (1, 4)),
        "underflow": ({K1: np.float64([1e-300])}, [K1, "is 0"], (1, 4)),
        "shape": ({K1: np.ones(3, np.float32)}, [K1, "shape [3]", "[2, 1, 1]"], (1, 4)),
        "matrix": ({K1: np.ones((2, 2), np.float32)}, [K1, "shape [2, 2]"], (1, 4)),
        "integers": ({V1: np.ones(1, np.int8)}, [V1, "stored as I8"], (2, 1)),
        "missing": ({K1: None, V1: None}, [f"{K1} is missing", f"{V1} is missing"], (1, 1)),
        "only k": ({V1: None}, [f"{V1} is missing", "half a pair", K1], (2, 1)),
        "only v": ({K1: None}, [f"{K1} is missing", "half a pair", V1], (1, 4)),
        "zero point": (
            {LAYER.format(1) + "k_zero_point": np.ones(1, np.int8)},
            ["k_zero_point is not zero"],
            (1, 4),
        ),
        "float8 zero point": (
            {LAYER.format(1) + "k_zero_point": np.ones(1, ml_dtypes.float8_e4m3fn)},
            ["k_zero_point is not zero"],
            (1, 4),
        ),
        "no such layer": (
            {k0.replace(".0.", ".2."): np.float32([1])},
            ["layer 2", "belongs to no layer", "has 2"],
            (2, 4),
        ),
        "unmatched": (
            {K1.replace("k_scale", "key_scale"): np.float32([1])},
            ["key_scale", "no known convention"],
            (2, 4),
        ),
        "no layer": (
            {"model.k_scale": np.float32([1])},
            ["model.k_scale", "no known convention"],
            (2, 4),
        ),
        "two that differ": (
            {K1.replace("k_s", "k_proj.k_s"): np.float32([3])},
            [K1, "k_proj.k_scale", "differ"],
            (3, 4),
        ),
        "a bad query": ({K1.replace("k_s", "q_s"): np.float32([0])}, ["q_scale", "is 0"], (2, 4)),
    }


CASES = list(edits(None))


@pytest.mark.parametrize("case", CASES)
def test_an_invalid_scale_is_refused_or_replaced_with_a_warning(tiny, tmp_path, case):
    edit, named, expected = edits(tiny)[case]
    tensors = tiny.scales("compressed-tensors", [0.5, 2.0], [0.25, 4.0]) | edit
    folder = folder_of(
        tiny,
        tmp_path,
        more={name: tensor for name, tensor in tensors.items() if tensor is not None},
    )
    layer = [] if case in ("unmatched", "no layer", "no such layer") else ["layer 1: "]
    refused(folder, *layer, *named, "strict=False")
    with pytest.warns(UserWarning) as warned:
        params = load(folder, strict=False)
    (warned,) = [str(warning.message) for warning in warned]
    assert all(part in warned for part in (str(folder), *layer, *named)), warned
    assert params.kv_scales.k[:, 0, 0].tolist() == [0.5, expected[0]]
    assert params.kv_scales.v[:, 0, 0].tolist() == [0.25, expected[1]]


def test_errors_count_further_issues_and_warnings_list_all(tiny, tmp_path):
    folder = folder_of(
        tiny, tmp_path, more=tiny.scales("Quark", np.zeros(12), np.ones(12)), num_hidden_layers=12
    )
    refused(folder, "layer 7: ", "and 4 more")
    with pytest.warns(UserWarning) as warned:
        assert (load(folder, strict=False).kv_scales.k == 1).all()
    assert all(
        f"layer {layer}: {LAYER.format(layer)}k_proj.output_scale is 0" in str(warned[0].message)
        for layer in range(12)
    )


@pytest.mark.parametrize(("part", "other"), [("k", "v"), ("v", "k")])
def test_k_scales_without_v_scales_and_conversely_are_refused(tiny, tmp_path, part, other):
    tensors = {
        name: t
        for name, t in tiny.scales("ModelOpt", *numbers(2, 2)).items()
        if name.endswith(f"{part}_scale")
    }
    folder = folder_of(tiny, tmp_path, "ModelOpt", tensors)
    refused(
        folder,
        f"layer 0: {LAYER.format(0)}{part}_proj.{part}_scale has no {other.upper()} scale beside "
        "it: half a pair",
    )
    with pytest.warns(UserWarning, match="half a pair: scale 1 is used instead"):
        assert (getattr(load(folder, strict=False).kv_scales, other) == 1).all()


def test_a_missing_shared_scale_is_reported_once(tiny, tmp_path):
    tensors = tiny.scales("AutoFP8", [0.5], [0.5])
    found = read_scale_report(only_scales(tiny, tmp_path, tensors, "AutoFP8"))
    assert [str(problem) for problem in found.issues] == [
        f"layer 1: {LAYER.format(1)}kv_scale is missing"
    ]


def test_zero_points_of_zero_and_equal_duplicates_are_accepted(tiny, tmp_path):
    scales = tiny.scales("compressed-tensors", [0.5, 2.0], [0.25, 4.0])
    zeros = {
        name.replace("_scale", "_zero_point"): np.zeros(1, ml_dtypes.float8_e4m3fn)
        for name in scales
    }
    zeros |= {LAYER.format(0) + "q_zero_point": np.zeros((4, 1, 1), np.int8)}
    params = load(
        folder_of(
            tiny, tmp_path, more=scales | zeros | tiny.scales("fused", [0.5, 2.0], [0.25, 4.0])
        )
    )
    assert params.kv_scales.k.ravel().tolist() == [0.5, 2]


# Formats


@pytest.mark.parametrize(
    "quantization",
    [
        {
            "quant_method": "quark",
            "kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3fnuz"}}},
        },
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8_E4M3FNUZ"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "dtype": "float8_e4m3fnuz"},
        },
    ],
    ids=lambda quantization: quantization["quant_method"],
)
def test_scales_for_e4m3fnuz_are_halved_with_a_warning(tiny, tmp_path, quantization):
    """An E4M3FNUZ code (exponent bias 8) is half the value of the same E4M3FN code in ml_dtypes."""
    codes = np.arange(0x01, 0x7F, dtype=np.uint8)
    halves = codes.view(ml_dtypes.float8_e4m3fnuz).astype(np.float32)
    assert np.array_equal(halves * 2, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    folder = folder_of(
        tiny,
        tmp_path,
        more=tiny.scales("Quark", [0.5, 2.0], [1.0, 4.0]),
        quantization_config=quantization,
    )
    with pytest.warns(UserWarning, match="for fp8_e4m3fnuz: halved"):
        params = load(folder)
    assert params.config.kv_cache_dtype == "fp8_e4m3"
    assert params.kv_scales.k.ravel().tolist() == [
        0.25,
        1,
    ] and params.kv_scales.v.ravel().tolist() == [0.5, 2]
    assert {layer.converted_from for layer in read_scale_report(folder).layers} == {
        ("fp8_e4m3fnuz",)
    }


@pytest.mark.parametrize(
    ("quantization", "fp8_format"),
    [
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {},
                "kv_cache_scheme": {"num_bits": 8, "type": "int"},
            },
            "int of 8 bits",
        ),
    ],
)
def test_scales_for_other_caches_are_ignored_with_a_warning(
    tiny, tmp_path, quantization, fp8_format
):
    folder = folder_of(
        tiny,
        tmp_path,
        more=tiny.scales("ModelOpt", [0.5, 0], [1, 4]),
        quantization_config=quantization,
    )
    with pytest.warns(UserWarning) as warned:
        params = load(folder)
    assert any(f"ignored: they are for {fp8_format}" in str(warning.message) for warning in warned)
    assert params.kv_scales is None and params.config.kv_cache_dtype is None


def test_undeclared_scales_are_loaded_but_do_not_change_the_cache(tiny, tmp_path):
    folder = folder_of(
        tiny,
        tmp_path,
        more=tiny.scales("ModelOpt", [0.5, 2.0], [1.0, 4.0]),
        quantization_config=None,
    )
    with pytest.warns(UserWarning, match="declares no FP8 cache"):
        params = load(folder)
    assert params.kv_scales.k.ravel().tolist() == [0.5, 2] and params.config.kv_cache_dtype is None


def test_a_declared_cache_without_scales_gives_a_warning(tiny, tmp_path):
    with pytest.warns(UserWarning, match="declares an fp8_e4m3 cache but has no scales"):
        assert load(folder_of(tiny, tmp_path / "a")).kv_scales is None
    dynamic = tiny.scale_layouts["compressed-tensors"][2] | {
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}
    }
    assert (
        load(folder_of(tiny, tmp_path / "b", quantization_config=dynamic)).kv_scales is None
    )  # dynamic scales


# The side-car


def test_a_sidecar_has_one_scale_for_k_and_v_and_declares_the_cache(tiny, tmp_path):
    folder = tiny.sidecar(folder_of(tiny, tmp_path, quantization_config=None), [[0.5, 2.0]])
    params = load(folder)
    assert params.kv_scales.k.ravel().tolist() == params.kv_scales.v.ravel().tolist() == [0.5, 2]
    assert params.config.kv_cache_dtype == "fp8_e4m3"
    found = read_scale_report(folder)
    assert [layer.used[0].source for layer in found.layers] == [
        f"kv_cache_scales.json: layer {n}" for n in (0, 1)
    ]
    assert found.file == "kv_cache_scales.json"


def test_equal_ranks_of_a_sidecar_are_merged(tiny, tmp_path):
    folder = tiny.sidecar(
        folder_of(tiny, tmp_path, quantization_config=None), [[0.5, 2.0], [0.5, 2.0]]
    )
    assert load(folder).kv_scales.k.ravel().tolist() == [0.5, 2]


def test_the_largest_of_different_ranks_is_used_with_a_warning(tiny, tmp_path):
    folder = tiny.sidecar(
        folder_of(tiny, tmp_path, quantization_config=None), [[0.5, 2.0], [0.5, 3.0]]
    )
    with pytest.warns(
        UserWarning, match=r"2 tensor-parallel ranks that differ \(in 1 layers, first in layer 1\)"
    ):
        assert load(folder).kv_scales.k.ravel().tolist() == [0.5, 3]


@pytest.mark.parametrize(
    ("dtype", "factor", "kv_dtype"),
    [("float8_e4m3fnuz", 0.5, "fp8_e4m3"), ("float8_e5m2", 128, "fp8_e5m2")],
)
def test_a_sidecar_of_another_format_is_converted(tiny, tmp_path, dtype, factor, kv_dtype):
    folder = tiny.sidecar(folder_of(tiny, tmp_path, quantization_config=None), [[0.5, 2.0]], dtype)
    with pytest.warns(UserWarning, match=f"scales are for {dtype.replace('float8', 'fp8')}"):
        params = load(folder)
    assert (
        params.kv_scales.k.ravel().tolist() == [0.5 * factor, 2 * factor]
        and params.config.kv_cache_dtype == kv_dtype
    )


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([[0.5]], ["layer 1: kv_cache_scales.json: layer 1 is missing"]),
        ([[0.5, 0.0]], ["layer 1: kv_cache_scales.json: layer 1 is 0"]),
        ([[0.5, float("nan")]], ["layer 1", "is nan"]),
        ([[0.5, 10**400]], ["layer 1", "is inf"]),
        ([[0.5, 2.0], [0.5]], ["layer 1", "no scale for rank 1"]),
        ([[0.5, 2.0, 1.0]], ["layer 2", "belongs to no layer"]),
    ],
)
def test_an_invalid_scale_of_a_sidecar_is_refused_or_replaced(tiny, tmp_path, ranks, named):
    folder = tiny.sidecar(folder_of(tiny, tmp_path, quantization_config=None), ranks)
    refused(folder, *named)
    with pytest.warns(UserWarning) as warned:
        scales = load(folder, strict=False).kv_scales
    assert all(part in str(warned[0].message) for part in named)
    assert scales.k.ravel().tolist() == [0.5, 2 if len(ranks[0]) == 3 else 1]


def test_a_sidecar_of_another_model_is_refused(tiny, tmp_path):
    folder = tiny.sidecar(
        folder_of(tiny, tmp_path, quantization_config=None), [[0.5, 2.0]], model_type="qwen2"
    )
    refused(folder, "kv_cache_scales.json is for model_type 'qwen2', and this model is 'llama'")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"kv_cache": {"dtype": "int8", "scaling_factor": {"0": {"0": 1.0, "1": 1.0}}}},
        {"kv_cache": {"dtype": "float8_e4m3fn"}},
        {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": [1.0, 1.0]}}},
        {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"first": 1.0}}}},
        {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": "1.0"}}}},
    ],
)
def test_a_malformed_sidecar_is_refused(tiny, tmp_path, content):
    folder = folder_of(tiny, tmp_path, quantization_config=None)
    (folder / "kv_cache_scales.json").write_text(json.dumps(content))
    refused(folder, "kv_cache_scales.json")
