"""Observers on blocks of known content: results follow by hand or from a NumPy loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.core.formats import E4M3, E5M2, KVFormat, encode_numpy
from jfp8kv.quality.observers import (
    CANDIDATES,
    STEPS_PER_OCTAVE,
    AmaxObserver,
    HistogramObserver,
    MSEObserver,
    ScaleShape,
    upper_edges,
)
from jfp8kv.quality.options import GRANULARITIES

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
update = jax.jit(lambda statistics, layer, x, real: statistics.update(layer, x, real))


def units(
    granularity: str = "tensor", layers: int = 1, kv_heads: int = 1, head_dim: int = 1
) -> ScaleShape:
    return ScaleShape(layers, kv_heads, head_dim, granularity)


def see(statistics, *blocks: np.ndarray, layer: int = 0):
    """Return the statistics after blocks `[kinds, tokens, kv_heads, head_dim]`, on the host."""
    for x in blocks:
        statistics = update(
            statistics, jnp.int32(layer), jnp.asarray(x, jnp.float32), jnp.ones(x.shape[1], bool)
        )
    return statistics.to_host()


def column(values) -> np.ndarray:
    """Return one channel of one head with these values, in K and in V."""
    return np.broadcast_to(
        np.asarray(values, np.float32).reshape(1, -1, 1, 1), (2, len(values), 1, 1)
    )


def scale_of(
    observer: str, x: np.ndarray, fmt: KVFormat, of: ScaleShape, percent: float = 99.99
) -> np.ndarray:
    """Return scales `[layers, kinds, heads, channels]` for one block."""
    if observer == "amax":
        return see(AmaxObserver.empty(of), x).scales(fmt)
    if observer == "percentile":
        return see(HistogramObserver.empty(of), x).scales(fmt, percent)
    return see(MSEObserver.of(see(AmaxObserver.empty(of), x), fmt), x).scales()


OBSERVERS = pytest.mark.parametrize("observer", ["amax", "percentile", "mse"])


@FORMATS
def test_the_largest_magnitude_becomes_the_largest_finite_value(fmt):
    x = column(np.linspace(-3.0, 2.0, 1000))
    scale = scale_of("amax", x, fmt, units())
    assert scale.tolist() == [[[[np.float32(3.0 / fmt.largest)]]] * 2]


@FORMATS
@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.99, 100.0])
def test_a_percentile_of_a_uniform_distribution_is_that_value(fmt, percent):
    """Of 1, 2, ..., 10000 thousandths, p % do not exceed p / 10. A bin is at most 33/32 wide."""
    bound = (
        scale_of("percentile", column(np.arange(1, 10001) / 1000), fmt, units(), percent)
        * fmt.largest
    )
    value = percent / 10
    assert np.all(value * (1 - 1e-6) <= bound) and np.all(bound <= value * 33 / 32)


def test_an_outlier_determines_amax_and_not_the_percentile():
    """One of 10000 values is 1000; the 99.99th percentile is the largest of the others, 1."""
    x = column([*np.linspace(0.0, 1.0, 9999), 1000.0])
    assert scale_of("amax", x, E4M3, units()).max() == np.float32(1000 / 448)
    bound = scale_of("percentile", x, E4M3, units(), 99.99).max() * 448
    assert 1.0 <= bound <= 33 / 32
    assert scale_of("percentile", x, E4M3, units(), 100.0).max() == np.float32(1000 / 448)


def test_mse_clips_one_value_to_store_all_others_exactly():
    """With amax the ones fall between two codes; with 1/8 octave less each is a code."""
    x = column([1.0] * 10000 + [2 ** (1 / 8)])
    assert scale_of("mse", x, E4M3, units()) == pytest.approx(
        np.full((1, 2, 1, 1), 1 / 448), rel=1e-6
    )


@FORMATS
@OBSERVERS
def test_a_constant_is_stored_as_the_largest_value(observer, fmt):
    assert scale_of(observer, column([-0.75] * 100), fmt, units()) == pytest.approx(
        0.75 / fmt.largest, rel=1e-6
    )


@FORMATS
@OBSERVERS
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-45])
def test_zeros_and_subnormals_give_scale_one(observer, fmt, value):
    assert np.all(scale_of(observer, column([value] * 10), fmt, units()) == 1)


@FORMATS
@OBSERVERS
@pytest.mark.parametrize("value", [2e-38, 1e6, 3e38])
def test_every_magnitude_gives_a_scale_with_a_finite_inverse(observer, fmt, value):
    scale = scale_of(observer, column([value, value / 2]), fmt, units())
    assert np.all(np.isfinite(1 / scale)) and np.all(scale >= 2.0**-126)
    if value > 1:
        assert scale == pytest.approx(value / fmt.largest, rel=1e-6)


def test_small_values_below_the_first_bin_are_within_its_width():
    """The percentile is zero: the bound is the edge of the first bin, 33/32 of 2**-16."""
    bound = scale_of("percentile", column([0.0] * 60 + [1.0] * 40), E4M3, units(), 50.0) * 448
    assert bound == pytest.approx(2.0**-16 * 33 / 32)


def test_bins_end_at_most_a_thirty_second_above_one_another():
    edges = upper_edges()[:-1].astype(np.float64)
    assert edges[0] == 2.0**-16 * 33 / 32 and edges[-1] == 2.0**16 * 63 / 64
    assert np.all(edges[1:] > edges[:-1]) and np.all(edges[1:] / edges[:-1] <= 33 / 32)


def shared(x: np.ndarray, granularity: str) -> tuple[int, ...]:
    """Return the axes of a block `[kinds, tokens, kv_heads, head_dim]` that share a scale."""
    return {"tensor": (1, 2, 3), "head": (1, 3), "channel": (1,)}[granularity]


def errors_of(x: np.ndarray, scale: np.ndarray, fmt: KVFormat, granularity: str) -> np.ndarray:
    """Return the squared error of `x` with `scale`, float64 `[kinds, 1, heads, channels]`."""
    stored = (
        encode_numpy(x * (np.float32(1) / scale), fmt).view(fmt.dtype).astype(np.float64) * scale
    )
    return np.sum((x - stored) ** 2, axis=shared(x, granularity), keepdims=True)


@FORMATS
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_mse_matches_a_search_in_numpy(granularity, fmt):
    """Errors are float32 sums, rounded to 2**-30 of amax**2: near ties differ within 1e-4."""
    x = np.random.default_rng(0).standard_t(3, (2, 300, 2, 4)).astype(np.float32)
    of = units(granularity, kv_heads=2, head_dim=4)
    found = scale_of("mse", x, fmt, of)[0][:, None]
    amax = np.abs(x).max(axis=shared(x, granularity), keepdims=True) / fmt.largest
    candidates = [np.float32(amax * 2 ** (-i / STEPS_PER_OCTAVE)) for i in range(CANDIDATES)]
    least = np.min([errors_of(x, c, fmt, granularity) for c in candidates], axis=0)
    assert np.all(errors_of(x, found, fmt, granularity) <= least * (1 + 1e-4))
    steps = np.log2(amax / found) * STEPS_PER_OCTAVE
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_counts_match_numpy_and_ignore_padding(granularity):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2, 40, 3, 4)) * np.exp(rng.uniform(-12, 12, (2, 40, 3, 4)))).astype(
        np.float32
    )
    real = np.arange(40) < 25
    x[:, 30] = np.nan
    of = units(granularity, layers=2, kv_heads=3, head_dim=4)
    got = update(
        HistogramObserver.empty(of), jnp.int32(1), jnp.asarray(x), jnp.asarray(real)
    ).to_host()
    kept, edges = np.abs(x[:, real]), upper_edges()
    assert not got.counts[0].any() and not got.amax[0].any()
    for kind, head, channel in np.ndindex(*got.counts.shape[1:4]):
        part = kept[kind]
        part = part if granularity == "tensor" else part[:, head]
        part = part[:, channel] if granularity == "channel" else part
        wanted = np.bincount(
            np.searchsorted(edges, part.ravel(), side="right"), minlength=len(edges)
        )
        np.testing.assert_array_equal(got.counts[1, kind, head, channel], wanted)
        assert got.amax[1, kind, head, channel] == part.max()


@pytest.mark.parametrize("kind", ["amax", "percentile", "mse"])
def test_any_order_of_blocks_and_merges_gives_the_same_statistics(kind):
    rng = np.random.default_rng(2)
    blocks = [rng.standard_normal((2, 8, 2, 4)).astype(np.float32) * 10.0**i for i in range(-2, 3)]
    of = units("head", kv_heads=2, head_dim=4)
    peaks = see(AmaxObserver.empty(of), *blocks)
    empty = {
        "amax": AmaxObserver.empty(of),
        "percentile": HistogramObserver.empty(of),
        "mse": MSEObserver.of(peaks, E4M3),
    }[kind]
    each = [see(empty, block) for block in blocks]
    left, right = each[0], each[-1]
    for one, other in zip(each[1:], reversed(each[:-1]), strict=True):
        left, right = left.merge(one), other.merge(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_max_tokens_of_a_histogram_keeps_counts_below_overflow():
    of = units("tensor", kv_heads=8, head_dim=128)
    assert HistogramObserver.empty(of).max_tokens(of) * of.values_per_token < 2**31
    assert math.prod(of.shape) == 2
