"""`inspect` reports the scales of an FP8 cache by layer and every issue, and never raises."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jfp8kv
from jfp8kv.checkpoint import safetensors as reader
from tests.checkpoint.conftest import (
    SCALE_LAYOUTS,
    hf_config,
    hf_tensors,
    scale_tensors,
    write_folder,
    write_sidecar,
)

AT = "model.layers.{}.self_attn.{}"
K0, V0, K1, V1 = (AT.format(layer, f"{part}_scale") for layer in (0, 1) for part in "kv")
GIVEN = [0.5, 2.0], [0.25, 4.0]
STRICT = "Strict loading refuses these scales; with strict=False (--no-strict) the fallbacks apply."


def folder_of(path: Path, scales: dict, layout: str = "compressed-tensors", **changes) -> Path:
    """Write a model of two layers with these scale tensors; None omits one."""
    config = hf_config(**({"quantization_config": SCALE_LAYOUTS[layout][2]} | changes))
    tensors = hf_tensors(config) | scales
    return write_folder(
        path, config, {name: tensor for name, tensor in tensors.items() if tensor is not None}
    )


def in_words(found: jfp8kv.ModelReport) -> str:
    """Return the printed report with one space between columns."""
    return "\n".join(" ".join(line.split()) for line in str(found).splitlines())


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_every_naming_convention_gives_a_row_for_each_layer(tmp_path, layout):
    k, v = (GIVEN[0], GIVEN[0]) if layout == "AutoFP8" else GIVEN
    found = jfp8kv.inspect(folder_of(tmp_path, scale_tensors(layout, k, v), layout))
    names = [
        tuple(dict.fromkeys(f"model.layers.{n}.{end}" for end in SCALE_LAYOUTS[layout][:2]))
        for n in (0, 1)
    ]
    for n, row in enumerate(found.scales.layers):
        assert (row.layer, row.k, row.v, row.sources) == (n, (k[n], k[n]), (v[n], v[n]), names[n])
        assert (row.granularity, row.verdict) == ("tensor", "used")
        assert f"\n{n} {k[n]:g} {v[n]:g} {', '.join(names[n])} tensor used" in in_words(found)
    assert (
        found.scales.issues == found.scales.notes == found.scales.unused == ()
        and STRICT not in str(found)
    )


def test_only_scales_are_read_and_scales_per_head_are_shown_as_a_range(tmp_path, monkeypatch):
    folder = folder_of(
        tmp_path, scale_tensors("compressed-tensors", [[0.5, 0.125], [2.0, 2.0]], *[GIVEN[1]])
    )
    sizes, read = [], reader.read_exactly
    monkeypatch.setattr(
        reader,
        "read_exactly",
        lambda path, offset, out: sizes.append(out.nbytes) or read(path, offset, out),
    )
    found = jfp8kv.inspect(folder)
    assert sorted(sizes) == [4, 4, 8, 8]
    assert (found.scales.granularity, found.scales.layers[0].k, found.scales.layers[1].k) == (
        "head",
        (0.125, 0.5),
        (2, 2),
    )
    assert f"\n0 0.125 to 0.5 0.25 {K0}, {V0} head used" in in_words(found)


# Changes to the valid scales of layer 1, and its K, V, sources and verdict.
IS_NO_SCALE = "a scale must be positive and finite: scale 1 is used instead"
Q1, FUSED = AT.format(1, "q_scale"), AT.format(1, "k_proj.k_scale")
BROKEN = {
    "zero": ({K1: np.float32([0])}, (1, 4), [K1, V1], f"{K1} is 0: {IS_NO_SCALE}"),
    "negative": ({V1: np.float32([-2])}, (2, 1), [K1, V1], f"{V1} is -2: {IS_NO_SCALE}"),
    "nan": ({K1: np.float32([np.nan])}, (1, 4), [K1, V1], f"{K1} is nan: {IS_NO_SCALE}"),
    "infinite": ({V1: np.float32([np.inf])}, (2, 1), [K1, V1], f"{V1} is inf: {IS_NO_SCALE}"),
    "a head's": (
        {K1: np.float32([1, 0])},
        (1, 4),
        [K1, V1],
        f"{K1} is 0 for head 1: {IS_NO_SCALE}",
    ),
    "shape": ({K1: np.ones(3, np.float32)}, (1, 4), [K1, V1], f"{K1} has shape [3]"),
    "dtype": ({K1: np.ones(1, np.int8)}, (1, 4), [K1, V1], f"{K1} is stored as I8"),
    "missing": (
        {K1: None, V1: None},
        (1, 1),
        [],
        f"{K1} is missing: scale 1 is used instead; {V1} is missing",
    ),
    "half a pair": (
        {V1: None},
        (2, 1),
        [K1],
        f"{V1} is missing beside {K1}: half a pair: scale 1 is used instead",
    ),
    "two that differ": (
        {FUSED: np.float32([3])},
        (3, 4),
        [K1, FUSED, V1],
        "differ, and only one of them can be",
    ),
    "a zero point": (
        {AT.format(1, "k_zero_point"): np.ones(1, np.int8)},
        (1, 4),
        None,
        "k_zero_point is not zero",
    ),
    "a query's": (
        {Q1: np.float32([0])},
        (2, 4),
        [K1, V1, Q1],
        f"used; {Q1} is 0: a scale must be positive",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_invalid_scale_is_reported_in_the_verdict_and_not_raised(tmp_path, case):
    edit, expected, sources, verdict = BROKEN[case]
    found = jfp8kv.inspect(
        folder_of(tmp_path, scale_tensors("compressed-tensors", *GIVEN) | edit), kv_dtype="fp8"
    )
    sound, row = found.scales.layers
    assert (sound.k, sound.v, sound.verdict) == ((0.5, 0.5), (0.25, 0.25), "used")
    assert (row.layer, row.k[0], row.v[0]) == (1, *expected) and verdict in row.verdict
    assert sources is None or sorted(row.sources) == sorted(sources)
    assert found.scales.issues and all(
        problem.startswith("layer 1: ") for problem in found.scales.issues
    )
    assert (
        f"\n1 {expected[0]:g} {expected[1]:g} " in in_words(found)
        and row.verdict in str(found)
        and STRICT in str(found)
    )
    with pytest.warns(UserWarning):
        scales = jfp8kv.load(tmp_path, strict=False).kv_scales
    assert (scales.k.max(axis=(1, 2))[1], scales.v.max(axis=(1, 2))[1]) == (row.k[1], row.v[1]), (
        "load uses something else"
    )


def test_scales_of_unknown_layers_are_reported(tmp_path):
    more = {AT.format(7, "k_scale"): np.float32([1]), AT.format(0, "key_scale"): np.float32([1])}
    found = jfp8kv.inspect(folder_of(tmp_path, scale_tensors("compressed-tensors", *GIVEN) | more))
    *layers, row = found.scales.layers
    assert [layer.verdict for layer in layers] == ["used", "used"]
    assert (row.layer, row.k, row.v, row.sources) == (7, None, None, (AT.format(7, "k_scale"),))
    assert (
        row.verdict
        == f"{AT.format(7, 'k_scale')} belongs to no layer: the model has 2, 0 to 1: it is ignored"
    )
    assert f"\n7 - - {AT.format(7, 'k_scale')} - {row.verdict}" in in_words(found)
    assert (
        f"\n{AT.format(0, 'key_scale')} looks like a KV-cache scale, but its name follows no known "
        "convention" in str(found)
    )
    assert set(found.scales.unused) == set(more)


def test_scales_of_queries_and_probabilities_are_reported_as_unused(tmp_path):
    q, prob = AT.format(0, "q_proj.output_scale"), AT.format(1, "prob_output_scale")
    more = {q: np.asarray([1, 2, 3, 4], ml_dtypes.bfloat16), prob: np.float32([0.5])}
    scales = jfp8kv.inspect(
        folder_of(tmp_path, scale_tensors("Quark", *GIVEN) | more, "Quark")
    ).scales
    assert [row.verdict for row in scales.layers] == [
        f"used; {q} (1 to 4) is not used",
        f"used; {prob} (0.5) is not used",
    ]
    assert (
        scales.unused == (q, prob)
        and scales.issues == ()
        and scales.layers[0].granularity == "tensor"
    )
    alone = jfp8kv.inspect(folder_of(tmp_path / "alone", {q: more[q]}, "Quark"))
    (row,) = alone.scales.layers
    assert (row.k, row.v, row.granularity, row.verdict) == (
        None,
        None,
        None,
        f"{q} (1 to 4) is not used",
    )


def test_a_sidecar_is_reported_with_its_format(tmp_path):
    folder = write_sidecar(
        folder_of(tmp_path, {}, quantization_config=None), [[0.5, float("nan")]], "float8_e4m3fnuz"
    )
    found = jfp8kv.inspect(folder)
    first, second = found.scales.layers
    assert (first.k, first.verdict) == ((0.25, 0.25), "used, converted from fp8_e4m3fnuz")
    assert (
        first.sources == ("kv_cache_scales.json: layer 0",) and "layer 1 is nan" in second.verdict
    )
    assert (
        found.scales.file == "kv_cache_scales.json"
        and "in kv_cache_scales.json; one per tensor" in str(found)
    )
    assert "Note: its KV-cache scales are for fp8_e4m3fnuz" in str(found)


def test_without_weights_their_scales_are_reported_as_not_read(tmp_path):
    config = hf_config(quantization_config=SCALE_LAYOUTS["ModelOpt"][2])
    tensors = hf_tensors(config) | scale_tensors("ModelOpt", *GIVEN)
    for shard in write_folder(tmp_path, config, tensors, shards=2).glob("*.safetensors"):
        shard.unlink()
    found = jfp8kv.inspect(tmp_path)
    assert found.scales.layers == found.scales.issues == ()
    (note,) = found.scales.notes
    assert (
        note.startswith("its weights are not present")
        and "lists 4 (such as model.layers.0.self_attn.k_proj.k_scale)" in note
    )
    (tmp_path / "model.safetensors.index.json").unlink()
    assert jfp8kv.inspect(tmp_path).scales.notes == (
        "its weights are not present, so KV-cache scales among them are not read.",
    )


def test_scales_of_this_library_are_reported_with_k_offsets(
    tmp_path,
):
    loaded = jfp8kv.load(folder_of(tmp_path / "model", {}, quantization_config=None))
    k, offset = np.full((2, 2, 16), 0.5, np.float32), np.zeros((2, 2, 16), np.float32)
    k[1, 1, 3], offset[0, 1, 2] = 0.125, -3
    scales = jfp8kv.KVScales(k, np.ones((2, 1, 1)), k_offset=offset, kv_dtype="fp8_e5m2")
    params = jfp8kv.Params(loaded.tree, loaded.config, kv_scales=scales)
    jfp8kv.save(params, tmp_path / "saved")
    for found, source in (
        (jfp8kv.inspect(params), "Params.kv_scales"),
        (jfp8kv.inspect(tmp_path / "saved"), "kv_scales.safetensors"),
    ):
        first, second = found.scales.layers
        assert (first.k, first.k_offset, second.k, second.k_offset) == (
            (0.5, 0.5),
            (-3, 0),
            (0.125, 0.5),
            (0, 0),
        )
        assert (first.sources, first.granularity, first.verdict) == ((source,), "channel", "used")
        assert f"\n0 0.5 1 -3 to 0 {source} channel used" in in_words(found)
        assert found.scales.notes == ("its KV scales are for fp8_e5m2.",)
    assert jfp8kv.inspect(loaded).scales.layers == () and "KV scales none found" in in_words(
        jfp8kv.inspect(loaded)
    )


def test_the_summary_is_json_for_any_scales(tmp_path):
    edit = {
        K1: np.float32([np.nan]),
        V1: np.float32([np.inf]),
        AT.format(0, "q_scale"): np.float32([-np.inf]),
    }
    found = jfp8kv.inspect(folder_of(tmp_path, scale_tensors("compressed-tensors", *GIVEN) | edit))
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))["scales"]
    assert (
        kept["layers"][0]["k"] == [0.5, 0.5]
        and "is nan" in kept["layers"][1]["verdict"]
        and len(kept["issues"]) == 3
    )
