"""Quantization statistics match NumPy on the given and the stored keys and values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from jfp8kv.attention import reference
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions, paged_attend
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.pool import LayerScales, new_pool, poison
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32, encode_numpy
from jfp8kv.quality.observe import observe
from jfp8kv.quality.quantization_stats import CacheStats, QuantStats, quantization_update

LAYERS, HEADS, DIM, SIZE, WIDTH, LAYER = 2, 3, 8, 4, 16, 1


@partial(jax.jit, static_argnums=0)  # one program for each layout, with static scales and without
def _seen(
    layout, scales: LayerScales | None, k: Array, v: Array, start: Array, length: Array
) -> QuantStats:
    pages = new_pool(layout, num_pages=9, page_size=SIZE, kv_heads=HEADS, head_dim=DIM)
    at = AttentionMetadata(jnp.array([4, 1, 7, 3, 0, 8, 2], jnp.int32), start, length, length)
    attend = paged_attend(reference.attention, scales, AttentionOptions(), lambda layer: at)
    valid = start + jnp.arange(WIDTH, dtype=jnp.int32) < length
    attend = observe(attend, quantization_update(scales, lambda layer: at, valid))
    zeros = [
        jnp.zeros((LAYERS, 2, HEADS), dtype)
        for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)
    ]
    carry = poison(pages, layout.specs[LAYER].fmt.nan_code), CacheStats(QuantStats(*zeros), None)
    return attend(LAYER, jnp.ones((WIDTH, HEADS, DIM), jnp.float32), k, v, carry)[1][1].quantization


def seen(
    fmt,
    scales: KVScales | None,
    k: np.ndarray,
    v: np.ndarray,
    *,
    start: int,
    real: int,
    beside=None,
) -> QuantStats:
    """Store `real` tokens from position `start` on, in scattered pages that were filled with NaN.

    Without `scales` they are dynamic. `beside` is the spec of the other layer, if it differs.
    """
    own = LayerCacheSpec(fmt, dynamic=scales is None)
    kinds = (beside or own, own)
    layout = PoolLayout.of(kinds, LayerGroups.of((0,) * LAYERS, slot_widths(kinds)))
    by_layer = (
        None
        if scales is None
        else LayerScales.of(scales, layers=LAYERS, kv_heads=HEADS, head_dim=DIM)
    )
    return _seen(layout, by_layer, k, v, np.int32(start), np.int32(start + real))


def given(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return magnitudes over 24 octaves, with a few zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, WIDTH, HEADS, DIM)) * np.exp2(
        rng.uniform(-14, 10, (2, WIDTH, HEADS, DIM))
    )
    x[rng.random(x.shape) < 0.05] = 0
    return tuple(x.astype(np.float32))


def stored(x: np.ndarray, fmt, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the cache stores of `x` with `scale`, and where that is the largest value."""
    code = encode_numpy(x * (np.float32(1) / scale), fmt).view(fmt.dtype).astype(np.float32)
    return code * scale, np.abs(code) == fmt.largest


def token_head_scale(x: np.ndarray, fmt) -> np.ndarray:
    """Return the smallest power of two that keeps each token's head in range; 2**-126 for zeros."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    exponent = np.full(amax.shape, -126.0)
    for i in np.ndindex(amax.shape):
        exponent[i] = next(e for e in range(-126, 128) if amax[i] <= fmt.largest * 2.0**e)
    return np.exp2(exponent).astype(np.float32)


SCALES = {
    "clips": np.array([2.0**-9, 2.0**-7, 1.0]),
    "flushes": np.array([1.0, 40.0, 900.0]),
    "by channel": np.exp2(np.random.default_rng(4).uniform(-6, 6, (HEADS, DIM))),
    "token_head": None,
}


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize(("start", "real"), [(0, 16), (7, 13), (11, 16)])
def test_error_clipped_and_flushed_match_numpy(fmt, kind, start, real):
    """Counts match exactly, sums of a hundred float32 squares to 1e-5."""
    x = np.stack(given())
    scale = SCALES[kind]
    if scale is None:
        scales, by = None, token_head_scale(x, fmt)
    else:
        scale = scale.reshape(HEADS, -1).astype(np.float32)
        scales = KVScales(*(np.broadcast_to(s, (LAYERS, *s.shape)) for s in (scale, 2 * scale)))
        by = np.stack([scale, 2 * scale])[:, None]
    found = seen(fmt, scales, *x, start=start, real=real)
    x = x[:, :real]
    decoded, at_largest = stored(x, fmt, by if scale is not None else by[:, :real])
    over = (1, 3)
    expected = {
        "signal": np.sum(x.astype(np.float64) ** 2, axis=over),
        "noise": np.sum((x.astype(np.float64) - decoded) ** 2, axis=over),
        "clipped": np.sum(at_largest & (np.abs(x) > np.abs(decoded) * (1 + 2.0**-22)), axis=over),
        "flushed": np.sum((x != 0) & (decoded == 0), axis=over),
    }
    for name, value in expected.items():
        values = np.asarray(getattr(found, name))
        assert not values[0].any(), "the other layer"
        np.testing.assert_allclose(
            values[LAYER], value, rtol=1e-5 if name in ("signal", "noise") else 0
        )
    assert kind != "clips" or expected["clipped"].any(), "otherwise this test shows nothing"
    assert kind != "flushes" or expected["flushed"].any()
    assert kind != "token_head" or not expected["clipped"].any()


def test_a_calibrated_amax_is_not_clipped():
    """A calibrated scale is amax / 448 in float32, so amax / scale is 448 up to two roundings."""
    k, v = given(1)
    k, v = k / 7, v / 7
    amax = [np.abs(x).max(axis=(0, 2)).reshape(1, HEADS, 1) for x in (k, v)]
    scales = KVScales(*(np.repeat(peak / np.float32(448), LAYERS, axis=0) for peak in amax))
    found = seen(E4M3, scales, k, v, start=0, real=WIDTH)
    assert not np.asarray(found.clipped).any()
    tight = seen(E4M3, KVScales(scales.k * 0.99, scales.v * 0.99), k, v, start=0, real=WIDTH)
    assert np.array_equal(np.asarray(tight.clipped[LAYER]) > 0, np.ones((2, HEADS), bool))


def test_a_float32_cache_has_no_error():
    found = seen(FLOAT32, KVScales.unit(LAYERS), *given(), start=5, real=12)
    assert np.asarray(found.signal[LAYER]).all()
    assert not any(np.asarray(x).any() for x in (found.noise, found.clipped, found.flushed))


def test_with_k_offsets_the_error_is_that_of_the_difference():
    """Keys around a constant beyond the range: without it few are clipped. The signal is that of
    whole keys."""
    rng = np.random.default_rng(6)
    offset = rng.normal(size=(1, HEADS, DIM)).astype(np.float32) * 900
    rest, v = given(2)
    k = offset + rest
    ones = np.ones((LAYERS, HEADS, DIM), np.float32)
    less = KVScales(ones, ones, k_offset=np.repeat(offset, LAYERS, axis=0))
    found, plain = (
        seen(E4M3, scales, k, v, start=3, real=12) for scales in (less, KVScales(ones, ones))
    )
    left = (k - offset)[:12]
    decoded, at_largest = stored(left, E4M3, np.float32(1))
    expected = {
        "signal": np.sum(k[:12].astype(np.float64) ** 2, axis=(0, 2)),
        "noise": np.sum((left.astype(np.float64) - decoded) ** 2, axis=(0, 2)),
        "clipped": np.sum(
            at_largest & (np.abs(left) > np.abs(decoded) * (1 + 2.0**-22)), axis=(0, 2)
        ),
        "flushed": np.sum((left != 0) & (decoded == 0), axis=(0, 2)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(getattr(found, name))[LAYER, 0], value, rtol=1e-5)
        np.testing.assert_array_equal(
            np.asarray(getattr(found, name))[LAYER, 1], np.asarray(getattr(plain, name))[LAYER, 1]
        )
    assert expected["flushed"].any()
    assert np.asarray(plain.clipped)[LAYER, 0].sum() > 10 * expected["clipped"].sum()


@pytest.mark.parametrize(
    "other", [LayerCacheSpec(BFLOAT16), LayerCacheSpec(E5M2, dynamic=True)], ids=str
)
def test_each_layer_is_measured_in_its_own_format(other):
    scales = KVScales(*(np.full((LAYERS, 1, 1), 2.0**-7, np.float32) for _ in "kv"))
    for fmt in (E4M3, FLOAT16):
        alone, beside = (
            seen(fmt, scales, *given(3), start=5, real=9, beside=kind) for kind in (None, other)
        )
        assert np.asarray(alone.clipped)[LAYER].any()
        for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(beside), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
