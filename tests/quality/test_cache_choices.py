"""The caches that are compared: formats and scales, labels, calibrated scales, refusals."""

import numpy as np
import pytest

import jfp8kv
from jfp8kv import CheckpointError, ConfigError
from jfp8kv.core.formats import kv_format
from jfp8kv.quality.cache_choices import CacheChoice, cache_choices, with_calibrated_scales
from jfp8kv.quality.data import split_prompts
from jfp8kv.quality.options import GRANULARITIES, CompareOptions
from tests.quality.test_calibrate import load, prompts

pytestmark = pytest.mark.quick_compile

NAME = "qwen2_bias"
MIX = {"default": "fp8_e4m3", "skip": [0]}
LAYERS = 2


def choices(kv_dtypes, kv_scales=("unit",)) -> list[CacheChoice]:
    options = CompareOptions.from_fields(kv_dtypes=kv_dtypes, kv_scales=kv_scales)
    return cache_choices(load(NAME), options)


def labels(*given) -> list[str]:
    return [choice.label for choice in choices(*given)]


def unit() -> jfp8kv.KVScales:
    return jfp8kv.KVScales.unit(LAYERS)


def of_plan() -> jfp8kv.KVPlan:
    return jfp8kv.KVPlan((jfp8kv.LayerPlan("fp8_e4m3", "unit"),) * LAYERS, unit(), 64.0)


def test_the_float32_cache_comes_first_then_each_format_with_its_scales():
    found = labels(["float32", "bfloat16", "fp8", "fp8_e5m2"], ["unit", "token_head"])
    assert found == [
        "float32",
        "bfloat16",
        "fp8_e4m3 unit",
        "fp8_e4m3 token_head",
        "fp8_e5m2 unit",
        "fp8_e5m2 token_head",
    ]


@pytest.mark.parametrize(
    "given", ["fp8_e4m3", ["fp8_e4m3"], ("fp8",), {"fp8_e4m3": "fp8"}, iter(["fp8_e4m3"])]
)
def test_one_format_may_be_given_alone_or_in_any_container(given):
    assert labels(given) == ["float32", "fp8_e4m3 unit"]


def test_mappings_and_pairs_label_caches():
    assert labels({"half": "bfloat16", "e4": "fp8"}, {"one": "unit", "own": unit()}) == [
        "float32",
        "half",
        "e4 one",
        "e4 own",
    ]
    assert labels(["fp8", ("mixed", MIX)], ["unit", ("mine", unit())]) == [
        "float32",
        "fp8_e4m3 unit",
        "fp8_e4m3 mine",
        "mixed unit",
        "mixed mine",
    ]


@pytest.mark.parametrize(
    "given", [MIX, [MIX], [["bfloat16", "fp8_e4m3"]], [("bfloat16", "fp8_e4m3")]]
)
def test_formats_by_layer_are_one_cache(given):
    assert labels(given) == ["float32", "bfloat16 x1, fp8_e4m3 x1 unit"]


def test_a_plan_comes_once_with_its_scales(tmp_path):
    of_plan().save(tmp_path / "best.kvplan")
    given = [of_plan(), tmp_path / "best.kvplan", ("mine", of_plan())]
    found = choices(given, ["unit", "token_head"])
    assert [choice.label for choice in found] == ["float32", "plan", "best.kvplan", "mine"]
    assert all(isinstance(c.kv_dtype, jfp8kv.KVPlan) and c.kv_scales == "auto" for c in found[1:])


def test_scales_in_a_file_have_its_name_and_equal_labels_are_numbered(tmp_path):
    unit().save(tmp_path / "found.safetensors")
    scales = [str(tmp_path / "found.safetensors"), tmp_path / "found.safetensors", unit(), unit()]
    wanted = [
        "found.safetensors",
        "found.safetensors (2)",
        "given, per tensor",
        "given, per tensor (2)",
    ]
    assert labels(["fp8"], scales)[1:] == [f"fp8_e4m3 {label}" for label in wanted]


BAD_DTYPES = {
    "none": ([], "kv_dtypes is empty"),
    "a number": (8, "kv_dtypes=8"),
    "an unknown name": (["fp8_e4m4"], "Did you mean 'fp8_e4m3'"),
    "an unknown name alone": ("fp9", "kv_dtype='fp9'"),
    "something else in a list": ([8], "kv_dtype=8"),
    "too few layers": ([["fp8"]], "lists 1 layers"),
    "a layer that is not there": ({"skip": [2]}, "skips layer 2"),
    "a misspelt key": ({"default": "fp8", "skp": [0]}, "'skp'"),
}
BAD_SCALES = {
    "none": ([], "kv_scales is empty"),
    "a number": (1.0, "kv_scales=1.0"),
    "a number in a list": ([1.0], "kv_scales=1.0"),
    "an unknown name": (["tokenhead"], "Did you mean 'token_head'"),
    "a file that is not there": (["/no/scales"], "'/no/scales'"),
    "a checkpoint without any": (["checkpoint"], "the checkpoint has none"),
    "those of another model": ([jfp8kv.KVScales.unit(7)], "do not fit a model"),
    "a file of something else": ([__file__], "not a KVScales file"),
}


@pytest.mark.parametrize("kind", BAD_DTYPES)
def test_invalid_formats_are_refused(kind):
    given, message = BAD_DTYPES[kind]
    with pytest.raises(ConfigError, match=message):
        choices(given)


@pytest.mark.parametrize("kind", BAD_SCALES)
def test_invalid_scales_are_refused(kind):
    given, message = BAD_SCALES[kind]
    with pytest.raises((ConfigError, CheckpointError), match=message):
        choices("fp8", given)


def test_invalid_options_are_refused_without_a_model():
    for given in (
        {"kv_dtypes": ["fp9"]},
        {"kv_scales": "heads"},
        {"window": 0},
        {"needle_lengths": [3]},
        {"needle_depths": 2},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(given))[:8]}.*="):
            CompareOptions.from_fields(**given)


def calibrated(kv_dtypes) -> dict[str, jfp8kv.KVScales]:
    cut = split_prompts(prompts(NAME, 40, 23), load(NAME), max_model_len=64, window=16)
    return {
        c.label: c.kv_scales
        for c in with_calibrated_scales(load(NAME), choices(kv_dtypes, GRANULARITIES), cut)
    }


def by_calibrate(kv_dtype: str, granularity: str) -> jfp8kv.KVScales:
    return jfp8kv.calibrate(
        load(NAME), prompts(NAME, 40, 23), kv_dtype=kv_dtype, granularity=granularity, window=16
    )


def test_calibrated_scales_equal_those_of_calibrate_bit_for_bit():
    found = calibrated(["fp8_e4m3", "fp8_e5m2"])
    for kv_dtype in ("fp8_e4m3", "fp8_e5m2"):
        for granularity in GRANULARITIES:
            ours, theirs = found[f"{kv_dtype} {granularity}"], by_calibrate(kv_dtype, granularity)
            np.testing.assert_array_equal(ours.k, theirs.k)
            np.testing.assert_array_equal(ours.v, theirs.v)
            assert ours.kv_dtype == theirs.kv_dtype == kv_format(kv_dtype).name


def test_with_mixed_formats_each_layer_gets_the_scale_of_its_format():
    found = calibrated({"mix": ["fp8_e5m2", "fp8_e4m3"], "half": ["fp8_e5m2", "bfloat16"]})
    first, second = by_calibrate("fp8_e5m2", "head"), by_calibrate("fp8_e4m3", "head")
    np.testing.assert_array_equal(found["mix head"].k, np.stack([first.k[0], second.k[1]]))
    np.testing.assert_array_equal(found["mix head"].v, np.stack([first.v[0], second.v[1]]))
    np.testing.assert_array_equal(
        found["half head"].k, np.stack([first.k[0], np.ones_like(first.k[1])])
    )
    assert found["mix head"].kv_dtype is None
