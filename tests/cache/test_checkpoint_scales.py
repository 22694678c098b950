"""Scales of a checkpoint reach the cache: the engine agrees with an oracle, for every layout."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import jfp8kv
from jfp8kv.core.errors import ConfigError
from tests.checkpoint.conftest import SCALE_LAYOUTS, scale_tensors, write_folder, write_sidecar
from tests.models.test_decoder import ENGINE, REFERENCES, rms
from tests.references import oracle

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_gqa"
LAYERS, HEADS = 2, 2
# The library multiplies by the inverse of a scale: a value may round to the other neighbor.
ROUNDING = 5e-3


def random_scales(heads: int, both: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return small scales, so that values are clipped; all different, so that a mix-up shows."""
    k, v = np.random.default_rng(3).uniform(0.002, 0.05, (2, LAYERS, heads)).astype(np.float32)
    return k, k if both else v


def model(path: Path, tensors: dict[str, np.ndarray], quantization: dict | None = None) -> Path:
    config = json.loads((FOLDER / "config.json").read_text())
    declared = {} if quantization is None else {"quantization_config": quantization}
    return write_folder(
        path, config | declared, safetensors.numpy.load_file(FOLDER / "model.safetensors") | tensors
    )


def with_scales(
    path: Path, k: np.ndarray, v: np.ndarray, layout: str = "compressed-tensors"
) -> Path:
    return model(path, scale_tensors(layout, k, v), SCALE_LAYOUTS[layout][2])


def logits(params: jfp8kv.Params, **kv) -> np.ndarray:
    return jfp8kv.LLM(params, **ENGINE | kv).logits(tokens())


def tokens() -> np.ndarray:
    return np.load(FOLDER / "reference.npz")["tokens"]


def expected(fmt: str, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return oracle.forward(FOLDER, tokens(), oracle.fp8_store(fmt, k[..., None], v[..., None]))


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("heads", [1, HEADS], ids=["tensor", "head"])
def test_by_default_the_cache_uses_the_scales_of_the_checkpoint(tmp_path, layout, heads) -> None:
    k, v = random_scales(heads, both=layout == "AutoFP8")
    params = jfp8kv.load(with_scales(tmp_path, k, v, layout), dtype="float32")
    want = expected("e4m3", k, v)
    assert rms(logits(params), want) <= ROUNDING
    assert rms(logits(params, kv_scales="unit"), want) > 10 * ROUNDING, "the scales must be visible"


def test_a_sidecar_scale_applies_to_keys_and_values(tmp_path) -> None:
    k, _ = random_scales(1)
    folder = write_sidecar(model(tmp_path, {}), [k[:, 0]])
    assert rms(logits(jfp8kv.load(folder, dtype="float32")), expected("e4m3", k, k)) <= ROUNDING


def test_a_layer_with_an_invalid_scale_uses_scale_1(tmp_path) -> None:
    k, v = random_scales(1)
    invalid, replaced = k.copy(), k.copy()
    invalid[1], replaced[1] = 0, 1
    with pytest.warns(UserWarning, match=r"layer 1: .*self_attn.k_scale is 0"):
        params = jfp8kv.load(with_scales(tmp_path, invalid, v), dtype="float32", strict=False)
    assert rms(logits(params), expected("e4m3", replaced, v)) <= ROUNDING


@pytest.mark.parametrize("kv_scales", ["auto", "checkpoint"])
def test_scales_are_converted_for_e5m2_with_a_warning(tmp_path, kv_scales) -> None:
    k, v = random_scales(HEADS)
    params = jfp8kv.load(with_scales(tmp_path, k, v), dtype="float32")
    with pytest.warns(UserWarning, match=r"computed for fp8_e4m3: for fp8_e5m2 .* 448 / 57344"):
        got = logits(params, kv_dtype="fp8_e5m2", kv_scales=kv_scales)
    assert rms(got, expected("e5m2", k / 128, v / 128)) <= ROUNDING


def test_scales_without_a_format_are_for_the_given_cache(tmp_path) -> None:
    k, v = random_scales(HEADS)
    params = jfp8kv.load(with_scales(tmp_path, k, v), dtype="float32")
    given = jfp8kv.KVScales(k[..., None], v[..., None])
    assert (
        rms(logits(params, kv_dtype="fp8_e5m2", kv_scales=given), expected("e5m2", k, v))
        <= ROUNDING
    )


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16"])
def test_16_and_32_bit_caches_ignore_the_scales_of_the_checkpoint(tmp_path, kv_dtype) -> None:
    params = jfp8kv.load(with_scales(tmp_path, *random_scales(1)), dtype="float32")
    plain = jfp8kv.load(FOLDER, dtype="float32")
    assert np.array_equal(logits(params, kv_dtype=kv_dtype), logits(plain, kv_dtype=kv_dtype))
    with pytest.raises(ConfigError, match="scales belong to an FP8 cache"):
        logits(params, kv_dtype=kv_dtype, kv_scales="checkpoint")


def test_scales_alone_do_not_select_an_fp8_cache(tmp_path) -> None:
    k, v = random_scales(1)
    with pytest.warns(UserWarning, match="declares no FP8 cache"):
        params = jfp8kv.load(model(tmp_path, scale_tensors("ModelOpt", k, v)), dtype="float32")
    assert np.array_equal(logits(params), logits(jfp8kv.load(FOLDER, dtype="float32")))
    assert rms(logits(params, kv_dtype="fp8_e4m3"), expected("e4m3", k, v)) <= ROUNDING


def test_other_scales_reuse_the_compiled_programs(tmp_path) -> None:
    """Of any granularity: they are broadcast before they are passed to a step."""
    k, v = random_scales(HEADS)
    first = jfp8kv.LLM(jfp8kv.load(with_scales(tmp_path / "a", k, v), dtype="float32"), **ENGINE)
    first.logits(tokens())
    second = jfp8kv.LLM(
        jfp8kv.load(with_scales(tmp_path / "b", k[:, :1] * 3, v[:, :1] * 5), dtype="float32"),
        **ENGINE,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = second.logits(tokens())
    assert second.stats.compilations == 0
    assert (
        rms(got, expected("e4m3", k[:, :1] * 3, v[:, :1] * 5))
        <= ROUNDING
        < rms(got, expected("e4m3", k, v))
    )


def test_scales_are_saved_and_loaded_with_the_model(tmp_path) -> None:
    params = jfp8kv.load(with_scales(tmp_path / "a", *random_scales(HEADS)))
    jfp8kv.save(params, tmp_path / "b")
    back = jfp8kv.load(tmp_path / "b")
    assert np.array_equal(back.kv_scales.k, params.kv_scales.k) and np.array_equal(
        back.kv_scales.v, params.kv_scales.v
    )
    assert back.config.kv_cache_dtype == "fp8_e4m3"
