"""K offsets: the constant part of keys after RoPE, subtracted without a change to attention."""

import numpy as np
import pytest

import jfp8kv
from jfp8kv.cache.plan import KVPlan, LayerPlan
from jfp8kv.core.errors import ConfigError
from jfp8kv.models.key_bias import mean_rotated_bias
from tests.models.test_decoder import rms
from tests.quality.test_calibrate import PROMPTS, captured, load, prompts

pytestmark = pytest.mark.quick_compile

NAME = "qwen2_bias"


def rotation(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine `[tokens, half]` of the model's RoPE, float64."""
    config = load(NAME).config
    half = config.head_dim // 2
    radians = np.outer(positions, config.ropes[0].theta ** -(np.arange(half) / half))
    return np.cos(radians), np.sin(radians)


def rotate(x: np.ndarray, positions: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """Rotate `x` `[..., tokens, kv_heads, head_dim]` by its positions, or back with `sign=-1`."""
    cos, sin = (each[:, None, :] for each in rotation(positions))
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([a * cos - sign * b * sin, b * cos + sign * a * sin], axis=-1)


def expected(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the offset, the largest deviation from the rotated mean, and the mean's distance."""
    keys = captured(NAME)[:, 0]
    positions = np.concatenate([np.arange(n) for n in PROMPTS])
    mean = rotate(keys, positions, -1.0).mean(axis=1)
    every = rotate(np.repeat(mean[:, None], tokens, axis=1), np.arange(tokens))
    offset = every.mean(axis=1)
    rotated = rotate(np.repeat(mean[:, None], len(positions), axis=1), positions)
    return offset, np.abs(keys - rotated).max(axis=1), np.abs(every - offset[:, None]).max(axis=1)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_offsets_and_scales_match_numpy(granularity) -> None:
    longest = 77
    given = prompts(NAME, *PROMPTS)
    found = jfp8kv.calibrate(
        load(NAME), given, granularity=granularity, k_offset=True, max_model_len=longest
    )
    plain = jfp8kv.calibrate(load(NAME), given, granularity=granularity)
    offset, deviation, distance = expected(longest)
    np.testing.assert_allclose(
        found.k_offset, offset, rtol=0, atol=1e-4 * np.abs(captured(NAME)).max()
    )
    over = {"tensor": (1, 2), "head": (2,), "channel": ()}[granularity]
    np.testing.assert_allclose(
        found.k, (deviation + distance).max(axis=over, keepdims=True) / 448, rtol=1e-3
    )
    np.testing.assert_array_equal(found.v, plain.v)
    assert found.kv_dtype == "fp8_e4m3" and found.granularity == granularity


def test_scales_fit_positions_that_no_prompt_reached() -> None:
    """In a sequence longer than the prompts, RoPE rotates the mean key further."""
    params, longest = load(NAME), 120
    scales = jfp8kv.calibrate(
        params, prompts(NAME, *PROMPTS), granularity="channel", k_offset=True, max_model_len=longest
    )
    mean = rotate(captured(NAME)[:, 0], np.concatenate([np.arange(n) for n in PROMPTS]), -1.0).mean(
        axis=1
    )
    far = (
        rotate(np.repeat(mean[:, None], longest, axis=1), np.arange(longest))
        - scales.k_offset[:, None]
    )
    assert np.all(np.abs(far).max(axis=1) <= scales.k * 448)


def test_headroom_widens_the_scales_and_leaves_the_offset() -> None:
    given = prompts(NAME, *PROMPTS)
    plain, wide = (
        jfp8kv.calibrate(load(NAME), given, k_offset=True, headroom=headroom)
        for headroom in (1.0, 2.0)
    )
    assert np.array_equal(wide.k, 2 * plain.k) and np.array_equal(wide.v, 2 * plain.v)
    assert np.array_equal(wide.k_offset, plain.k_offset)


def test_any_order_gives_the_same_offsets() -> None:
    given = prompts(NAME, 40, 23, 17, 64)
    one, other = (
        jfp8kv.calibrate(load(NAME), order, k_offset=True) for order in (given, given[::-1])
    )
    assert all(np.array_equal(value, other.arrays[name]) for name, value in one.arrays.items())


def test_without_rope_the_mean_is_the_offset() -> None:
    config = load("gpt2_saved").config
    mean = (
        np.random.default_rng(0)
        .normal(size=(config.layers, config.kv_heads, config.head_dim))
        .astype(np.float32)
    )
    offset, distance = mean_rotated_bias(config, mean, 50)
    assert np.array_equal(offset, mean) and not distance.any()


@pytest.mark.parametrize("name", [NAME, "gemma2_caps", "gpt_oss_saved"])
def test_offsets_do_not_change_attention_with_softcaps_and_sinks(name) -> None:
    """In float32 only rounding is left: 2**-24 of keys of norm 10 to 100, times |q| in scores."""
    params = load(name)
    c = params.config
    offset = 5 * np.random.default_rng(1).normal(size=(c.layers, c.kv_heads, c.head_dim))
    unit = np.ones((c.layers, 1, 1))
    plan = KVPlan(
        (LayerPlan("float32", k_offset=True),) * c.layers, jfp8kv.KVScales(unit, unit, offset), 1.0
    )
    (ids,) = prompts(name, 40)
    want = jfp8kv.logits(params, ids, kv_dtype="float32")
    assert 0 < rms(jfp8kv.logits(params, ids, kv_dtype=plan), want) <= 1e-4


def test_offsets_are_saved_with_the_scales(tmp_path) -> None:
    scales = jfp8kv.calibrate(load(NAME), prompts(NAME, 40), k_offset=True)
    scales.save(tmp_path / "scales.safetensors")
    again = jfp8kv.KVScales.load(tmp_path / "scales.safetensors")
    assert np.array_equal(again.k_offset, scales.k_offset) and again.kv_dtype == "fp8_e4m3"


@pytest.mark.parametrize(
    ("given", "message"),
    [({"k_offset": 1}, "True or False"), ({"observer": "mse", "k_offset": True}, "amax")],
)
def test_invalid_combinations_are_refused(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        jfp8kv.calibrate(load(NAME), prompts(NAME, 40), **given)
