"""`export` writes KV scales that other engines read, and that `load` reads back unchanged."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jfp8kv
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint import load
from jfp8kv.checkpoint.export import export
from jfp8kv.checkpoint.load import read_checkpoint_info
from jfp8kv.core.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parent.parent / "references"
LAYERS, HEADS, HEAD_DIM = 2, 2, 16
SHAPES = {
    "tensor": (LAYERS, 1, 1),
    "head": (LAYERS, HEADS, 1),
    "channel": (LAYERS, HEADS, HEAD_DIM),
}
IGNORE_LAYOUT_WARNING = "ignore:The layout 'compressed-tensors' cannot express"


@pytest.fixture(scope="module")
def params():
    """A model of two layers with two KV heads of dimension 16."""
    return load(ROOT / "llama_gqa")


def scales_of(k="head", v="head", offset=None, seed=0, kv_dtype="fp8_e4m3"):
    """Return random scales. `k`, `v` and `offset` are a granularity or a shape."""
    random = np.random.default_rng(seed)
    k, v, o = (SHAPES.get(each, each) for each in (k, v, offset))
    k, v = random.uniform(0.005, 0.05, k), random.uniform(0.005, 0.05, v)
    return KVScales(k, v, None if o is None else random.normal(size=o), kv_dtype)


def equal(a, b):
    """Return whether arrays (bit for bit) and formats are equal."""
    return a.kv_dtype == b.kv_dtype and {
        name: each.tobytes() for name, each in a.arrays.items()
    } == {name: each.tobytes() for name, each in b.arrays.items()}


def refused(folder, *named):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert all(part in str(error.value) for part in named), error.value


# The layout


SCHEME = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
    "scale_dtype": None,
    "zp_dtype": None,
    "observer": None,
    "observer_kwargs": {},
}
# compressed-tensors 0.20: `QuantizationConfig`; SCHEME has all fields of `QuantizationArgs`.
SCHEMA = {
    "quant_method": "compressed-tensors",
    "config_groups": {},
    "format": "dense",
    "global_compression_ratio": None,
    "ignore": [],
    "quantization_status": "frozen",
}


@pytest.mark.parametrize(
    ("granularity", "strategy", "shape"),
    [("tensor", "tensor", (1,)), ("head", "attn_head", (HEADS, 1, 1))],
)
def test_scales_are_written_as_by_llm_compressor_field_by_field(
    params, tmp_path, granularity, strategy, shape
):
    scales = scales_of(granularity, granularity)
    export(params, tmp_path, kv_scales=scales)
    declared = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert declared == SCHEMA | {"kv_cache_scheme": SCHEME | {"strategy": strategy}}
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    names = [
        f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(LAYERS) for part in "kv"
    ]
    assert sorted(name for name in tensors if name.endswith("scale")) == sorted(names)
    for layer in range(LAYERS):
        for part, values in (("k", scales.k), ("v", scales.v)):
            written = tensors[f"model.layers.{layer}.self_attn.{part}_scale"]
            assert written.shape == shape and written.dtype == np.float32
            assert written.ravel().tolist() == values[layer].ravel().tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_scale_names_follow_the_architecture(tmp_path):
    params = load(ROOT / "gpt2_saved")
    scales = KVScales(np.full((3, 3, 1), 0.5), np.full((3, 3, 1), 0.25), kv_dtype="fp8_e4m3")
    export(params, tmp_path, kv_scales=scales)
    assert "transformer.h.2.attn.v_scale" in safetensors.numpy.load_file(
        tmp_path / "model.safetensors"
    )
    assert equal(load(tmp_path).kv_scales, scales)


# Round trip


CASES = {
    "tensor": {"k": "tensor", "v": "tensor"},
    "head": {},
    "channel": {"k": "channel", "v": "channel"},
    "channel and offset": {"k": "channel", "v": "channel", "offset": "channel"},
    "head and offset": {"offset": "channel"},
    "tensor and offset": {"k": "tensor", "v": "tensor", "offset": "tensor"},
    "keys by head, values as one": {"v": "tensor"},
    "keys as one, values by channel": {"k": "tensor", "v": "channel"},
}


@pytest.mark.filterwarnings(IGNORE_LAYOUT_WARNING)
@pytest.mark.parametrize("case", CASES)
def test_scales_round_trip_bit_for_bit_and_declare_the_cache(params, tmp_path, case):
    scales = scales_of(**CASES[case])
    export(params, tmp_path, kv_scales=scales)
    back = load(tmp_path)
    assert equal(back.kv_scales, scales) and back.config.kv_cache_dtype == "fp8_e4m3"
    assert dataclasses.replace(back.config, kv_cache_dtype=None) == params.config


@pytest.mark.filterwarnings(IGNORE_LAYOUT_WARNING)
@pytest.mark.parametrize("case", ["tensor", "head", "channel", "channel and offset"])
def test_a_model_generates_the_same_tokens_after_export(tmp_path, case):
    params = load(ROOT / "llama_bf16")
    scales = scales_of(**CASES[case])
    export(params, tmp_path, kv_scales=scales)
    sizes = {"kv_cache_memory": "1MB", "max_model_len": 64, "max_num_seqs": 1}
    before = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", kv_scales=scales, **sizes)
    after = jfp8kv.LLM(str(tmp_path), **sizes)
    tokens = [
        llm.generate("the end", max_tokens=24, temperature=0, ignore_eos=True)[0].token_ids
        for llm in (before, after)
    ]
    assert tokens[0] == tokens[1]
    assert after.stats.kv_bytes_per_token == before.stats.kv_bytes_per_token


def test_channel_scales_of_one_kv_head_round_trip(tmp_path):
    params = load(ROOT / "llama_mqa")
    shape = (2, 1, 32)
    scales = scales_of(shape, shape, shape)
    with pytest.warns(UserWarning, match="Other engines get one scale per tensor"):
        export(params, tmp_path, kv_scales=scales)
    assert equal(load(tmp_path).kv_scales, scales)
    seen = jfp8kv.inspect(tmp_path).scales
    assert (
        seen.file == "kv_scales.jfp8kv"
        and [(row.granularity, row.verdict) for row in seen.layers] == [("channel", "used")] * 2
    )


def test_given_scales_replace_those_of_the_model(params, tmp_path):
    own, other = scales_of(seed=1), scales_of(seed=2)
    params = dataclasses.replace(params, kv_scales=own)
    other.save(tmp_path / "scales.safetensors")
    for number, (given, expected) in enumerate(
        [(None, own), (other, other), (str(tmp_path / "scales.safetensors"), other)]
    ):
        jfp8kv.export(params, tmp_path / str(number), kv_scales=given)
        assert equal(load(tmp_path / str(number)).kv_scales, expected)


# What other engines read


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("channel", "channel scales"),
        ("channel and offset", "channel scales and K offsets"),
        ("head and offset", "K offsets"),
        ("keys as one, values by channel", "channel scales"),
    ],
)
def test_scales_that_only_jfp8kv_reads_give_a_warning(params, tmp_path, case, what):
    with pytest.warns(UserWarning) as warned:
        export(params, tmp_path, kv_scales=scales_of(**CASES[case]))
    (warned,) = warned
    assert f"cannot express {what}: they are in kv_scales.jfp8kv" in str(warned.message)
    assert (
        "Other engines get one scale per head" in str(warned.message)
        and warned.filename == __file__
    )
    assert (tmp_path / "kv_scales.jfp8kv").stat().st_mode == (
        tmp_path / "config.json"
    ).stat().st_mode


def test_a_shape_that_loses_no_values_gives_no_warning(params, tmp_path):
    export(params, tmp_path, kv_scales=scales_of(**CASES["keys by head, values as one"]))
    assert (tmp_path / "kv_scales.jfp8kv").is_file()


@pytest.mark.filterwarnings(IGNORE_LAYOUT_WARNING)
@pytest.mark.parametrize(
    "case", ["channel", "channel and offset", "head and offset", "tensor and offset"]
)
def test_exported_scales_are_the_smallest_that_clip_no_value(params, tmp_path, case):
    scales = scales_of(**CASES[case])
    export(params, tmp_path, kv_scales=scales)
    (tmp_path / "kv_scales.jfp8kv").unlink()
    public = load(tmp_path).kv_scales
    offset = np.zeros((1, 1, 1)) if scales.k_offset is None else scales.k_offset
    for layer, head in np.ndindex(LAYERS, HEADS):

        def of(values, layer=layer, head=head):
            return np.broadcast_to(values, (LAYERS, HEADS, HEAD_DIM))[layer, head].astype(
                np.float64
            )

        largest = [
            max(abs(o + 448 * s), abs(o - 448 * s))
            for o, s in zip(of(offset), of(scales.k), strict=True)
        ]
        assert of(public.k)[0] * 448 == pytest.approx(max(largest), rel=1e-6)
        assert of(public.v)[0] == max(of(scales.v))


def test_scales_for_e5m2_are_converted_to_e4m3_with_a_warning(params, tmp_path):
    scales = scales_of(kv_dtype="fp8_e5m2")
    with pytest.warns(
        UserWarning, match="KV scales are for fp8_e5m2.*is for fp8_e4m3: they are multiplied"
    ) as warned:
        export(params, tmp_path, kv_scales=scales)
    assert warned[0].filename == __file__
    expected = KVScales(scales.k * np.float32(128), scales.v * np.float32(128), kv_dtype="fp8_e4m3")
    assert equal(load(tmp_path).kv_scales, expected)


def test_scales_without_a_format_are_exported_for_e4m3(params, tmp_path):
    scales = scales_of(kv_dtype=None)
    export(params, tmp_path, kv_scales=scales)
    assert equal(load(tmp_path).kv_scales, KVScales(scales.k, scales.v, kv_dtype="fp8_e4m3"))


def test_a_changed_cache_declaration_gives_a_warning(params, tmp_path):
    def declaring(kv_dtype):
        return dataclasses.replace(
            params, config=dataclasses.replace(params.config, kv_cache_dtype=kv_dtype)
        )

    with pytest.warns(
        UserWarning,
        match="declares an fp8_e4m3 cache and has no scales for it: the folder declares none",
    ):
        export(declaring("fp8_e4m3"), tmp_path / "a")
    assert load(tmp_path / "a").config.kv_cache_dtype is None
    with pytest.warns(
        UserWarning, match="declares an fp8_e5m2 cache: the folder declares fp8_e4m3"
    ):
        export(declaring("fp8_e5m2"), tmp_path / "b", kv_scales=scales_of())
    export(declaring("fp8_e4m3"), tmp_path / "c", kv_scales=scales_of())


# kv_scales.jfp8kv


@pytest.fixture
def exported(params, tmp_path):
    """A folder with channel scales in kv_scales.jfp8kv, and head scales in its tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(params, tmp_path / "model", kv_scales=scales_of("channel", "channel"))
    return tmp_path / "model"


def test_inspect_shows_the_kv_file_layer_by_layer(exported):
    found = jfp8kv.inspect(exported).scales
    assert (found.file, found.granularity, found.issues) == (
        "kv_scales.jfp8kv",
        "channel",
        (),
    )
    assert [(row.sources, row.granularity, row.verdict) for row in found.layers] == [
        (("kv_scales.jfp8kv",), "channel", "used")
    ] * LAYERS


def test_newer_scale_tensors_override_an_outdated_kv_file(exported):
    """A tool that calibrates the folder again does not know kv_scales.jfp8kv."""
    path = exported / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.layers.1.self_attn.k_scale"] *= np.float32(1.5)
    safetensors.numpy.save_file(tensors, path)
    refused(exported, "kv_scales.jfp8kv does not match the scales in the weights", "strict=False")
    with pytest.warns(
        UserWarning, match="kv_scales.jfp8kv does not match .*: the scales in the weights are used"
    ):
        found = load(exported, strict=False).kv_scales
    assert found.granularity == "head" and np.array_equal(
        found.k[1], tensors["model.layers.1.self_attn.k_scale"][:, 0]
    )


@pytest.mark.parametrize("what", ["damaged", "of another model", "of another format"])
def test_an_unusable_kv_file_is_refused_or_ignored(exported, what):
    path = exported / "kv_scales.jfp8kv"
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif what == "of another model":
        scales_of((3, 1, 1), (3, 1, 1)).save(path)
    else:
        safetensors.numpy.save_file({"scales": np.ones(2, np.float32)}, path)
    refused(exported, "kv_scales.jfp8kv cannot be used", "strict=False")
    with pytest.warns(UserWarning, match="kv_scales.jfp8kv cannot be used"):
        assert load(exported, strict=False).kv_scales.granularity == "head"


def test_a_kv_file_without_scale_tensors_is_used(params, tmp_path):
    export(params, tmp_path)
    scales = scales_of("channel", "channel")
    scales.save(tmp_path / "kv_scales.jfp8kv")
    assert equal(load(tmp_path).kv_scales, scales)


@pytest.mark.parametrize("weights", [True, False])
def test_the_kv_file_is_downloaded_from_the_hub_with_and_without_weights(monkeypatch, weights):
    patterns = []

    def snapshot_download(repo, *, allow_patterns, ignore_patterns):
        patterns.extend(allow_patterns)
        return str(ROOT / "llama_gqa")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    read_checkpoint_info("owner/name", weights=weights)
    assert "kv_scales.jfp8kv" in patterns and ("*.safetensors" in patterns) == weights


# Errors


def test_inexpressible_scales_are_refused_and_leave_no_files(params, tmp_path):
    plan = jfp8kv.KVPlan(
        (jfp8kv.LayerPlan("bfloat16"), jfp8kv.LayerPlan("fp8_e4m3", "unit")),
        KVScales.unit(2),
        100.0,
    )
    small = KVScales(np.full((LAYERS, 1, 1), 1e-36), np.ones((LAYERS, 1, 1)))
    cases = [
        (plan, r"kv_scales is a KVPlan: .*plan\.save"),
        (jnp.ones(2), "kv_scales=.*must be a KVScales"),
        (KVScales.unit(3), "layers=2"),
        (scales_of((LAYERS, 1, HEAD_DIM)), r"must be \[2, 1, 1\], \[2, 2, 1\] or \[2, 2, 16\]"),
        (
            small,
            r"kv_scales cannot be exported: layer 0: model\.layers\.0\.self_attn\.k_scale is 1e-36",
        ),
        (str(tmp_path / "nowhere"), "no such file"),
    ]
    for given, named in cases:
        with pytest.raises((ConfigError, CheckpointError), match=named):
            export(params, tmp_path / "out", kv_scales=given)
    assert not list(tmp_path.iterdir())
