"""Observers: statistics of keys and values from which calibration chooses scales.

- `AmaxObserver`: the largest magnitude.
- `MeanObserver`: also the sum of values, for K offsets.
- `HistogramObserver`: also counts by magnitude, for percentiles.
- `MSEObserver`: the squared quantization error of all values for each of several candidate scales.

Observers are frozen pytrees: `update` returns a new one. Merging is exact in any order, because it
takes maxima or sums of integers. Device statistics are float32 and int32. `to_host` converts them
to NumPy with 64-bit integers, and only host statistics are merged or converted to scales.

Axes: `kinds` is 2, K then V. `heads` is `kv_heads`, or 1 if heads share a scale. `channels` is
`head_dim`, or 1 if channels share a scale.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt32

from jfp8kv.cache.pool import Layer
from jfp8kv.core.formats import KVFormat, decode, encode
from jfp8kv.core.pytree import pytree, static
from jfp8kv.quality.options import Granularity

Block = Float[Array, "kinds tokens kv_heads head_dim"]
Valid = Bool[Array, " tokens"]
PerScale = Float32[Array | np.ndarray, "layers kinds heads channels"]
PerCandidate = Float32[Array | np.ndarray, "candidates layers kinds heads channels"]

S = TypeVar("S")

SMALLEST_NORMAL = 2.0**-126  # of float32; the inverse of a smaller scale would overflow


@dataclasses.dataclass(frozen=True)
class ScaleShape:
    """The sizes of a model and the granularity of its scales."""

    layers: int
    kv_heads: int
    head_dim: int
    granularity: Granularity

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[layers, kinds, heads, channels]`."""
        heads = 1 if self.granularity == "tensor" else self.kv_heads
        channels = self.head_dim if self.granularity == "channel" else 1
        return self.layers, 2, heads, channels

    @property
    def values_per_token(self) -> int:
        """How many values of one token share a scale."""
        return self.kv_heads * self.head_dim // math.prod(self.shape[2:])

    def at(self, granularity: Granularity) -> "ScaleShape":
        """Return the shape for another granularity."""
        return dataclasses.replace(self, granularity=granularity)


class Observer(Protocol):
    """The interface of observers, which `Calibrator` uses."""

    def update(self: S, layer: Layer, x: Block, valid: Valid) -> S:
        """Return the statistics with the keys and values `x` of `layer` at `valid` tokens."""
        ...

    def to_host(self: S) -> S:
        """Return the statistics in NumPy, with 64-bit integers."""
        ...

    def reset(self: S) -> S:
        """Return device statistics of no values."""
        ...

    def merge(self: S, other: S) -> S:
        """Return the statistics of the values of both. Both are on the host."""
        ...

    def max_tokens(self, shape: ScaleShape) -> int:
        """Return how many tokens device statistics can cover. 0 means a single chunk."""
        ...


def scales_from_amax(amax: np.ndarray, fmt: KVFormat) -> np.ndarray:
    """Return the float32 scales that map `amax` to the largest finite value of `fmt`.

    Where all values are zero or subnormal, the scale is 1: zeros are stored exactly, and values of
    other prompts are stored unscaled. No scale is below 2**-126, whose inverse is still finite.
    """
    amax = np.asarray(amax, np.float64)
    scale = np.where(amax < SMALLEST_NORMAL, 1.0, np.maximum(amax / fmt.largest, SMALLEST_NORMAL))
    return scale.astype(np.float32)


# -- amax ------------------------------------------------------------------------------------------


@pytree
class AmaxObserver:
    """The largest magnitude per scale; NaN or infinite once such a value was seen."""

    amax: PerScale

    @classmethod
    def empty(cls, shape: ScaleShape) -> "AmaxObserver":
        """Return the statistics of no values."""
        return cls(jnp.zeros(shape.shape, jnp.float32))

    def update(self, layer: Layer, x: Block, valid: Valid) -> "AmaxObserver":
        """See `Observer`."""
        return AmaxObserver(_update_amax(self.amax, layer, x, valid))

    def to_host(self) -> "AmaxObserver":
        """See `Observer`."""
        return AmaxObserver(np.asarray(self.amax))

    def reset(self) -> "AmaxObserver":
        """See `Observer`."""
        return AmaxObserver(jnp.zeros_like(self.amax))

    def max_tokens(self, shape: ScaleShape) -> int:
        """See `Observer`."""
        return sys.maxsize

    def merge(self, other: "AmaxObserver") -> "AmaxObserver":
        """See `Observer`."""
        return AmaxObserver(np.maximum(self.amax, other.amax))

    def widen_keys(self, margin: np.ndarray) -> "AmaxObserver":
        """Add `margin` `[layers, heads, channels]` to the magnitudes of keys."""
        amax = np.array(self.amax)
        amax[:, 0] += margin
        return AmaxObserver(amax)

    def coarsen(self, shape: ScaleShape) -> "AmaxObserver":
        """Return the statistics of a coarser granularity, that of `shape`."""
        over = tuple(axis for axis in (2, 3) if shape.shape[axis] == 1)
        return AmaxObserver(np.max(self.amax, axis=over, keepdims=True, initial=0))

    def scales(self, fmt: KVFormat, headroom: float = 1.0) -> np.ndarray:
        """Return `headroom * amax / largest`, float32, in the shape of `amax`."""
        return scales_from_amax(np.asarray(self.amax, np.float64) * headroom, fmt)


def _update_amax(amax: PerScale, layer: Layer, x: Block, valid: Valid) -> Array:
    magnitude = jnp.where(valid[:, None, None], _magnitude_bits(x), jnp.uint32(0))
    new = jnp.maximum(_magnitude_bits(amax[layer]), _reduce(jnp.max, magnitude, amax))
    return jnp.asarray(amax).at[layer].set(lax.bitcast_convert_type(new, jnp.float32))


# -- means -----------------------------------------------------------------------------------------

SUM_QUANTUM = 2.0**-24  # host sums are multiples of this, with an error of 2**-25 per block


@pytree
class MeanObserver:
    """The sum of values per scale, and amax. Host sums are int64 multiples of `SUM_QUANTUM`."""

    amax: PerScale
    sums: PerScale | Int[np.ndarray, "layers kinds heads channels"]

    @classmethod
    def empty(cls, shape: ScaleShape) -> "MeanObserver":
        """Return the statistics of no values."""
        return cls(jnp.zeros(shape.shape, jnp.float32), jnp.zeros(shape.shape, jnp.float32))

    def update(self, layer: Layer, x: Block, valid: Valid) -> "MeanObserver":
        """See `Observer`."""
        values = jnp.where(valid[:, None, None], x.astype(jnp.float32), 0.0)
        sums = jnp.asarray(self.sums).at[layer].add(_reduce(jnp.sum, values, self.sums))
        return MeanObserver(_update_amax(self.amax, layer, x, valid), sums)

    def to_host(self) -> "MeanObserver":
        """See `Observer`."""
        amax = np.asarray(self.amax)
        sums = np.asarray(self.sums, np.float64)
        sums = np.where(np.isfinite(amax), sums, 0.0)  # amax reports NaN and infinity
        return MeanObserver(amax, np.rint(sums / SUM_QUANTUM).astype(np.int64))

    def reset(self) -> "MeanObserver":
        """See `Observer`."""
        return MeanObserver(jnp.zeros_like(self.amax), jnp.zeros_like(self.sums))

    def max_tokens(self, shape: ScaleShape) -> int:
        """See `Observer`."""
        return 0

    def merge(self, other: "MeanObserver") -> "MeanObserver":
        """See `Observer`."""
        return MeanObserver(np.maximum(self.amax, other.amax), self.sums + other.sums)

    def mean_keys(self, tokens: int) -> np.ndarray:
        """Return the mean key over `tokens` tokens, float32 `[layers, heads, channels]`.

        Needs granularity "channel".
        """
        return (np.asarray(self.sums)[:, 0] * SUM_QUANTUM / tokens).astype(np.float32)


# -- percentile ------------------------------------------------------------------------------------

LOWEST_OCTAVE = -16
OCTAVES = 32
MANTISSA_BITS = 5  # an octave has 32 bins
BINS = OCTAVES << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_OFFSET = (127 + LOWEST_OCTAVE) << MANTISSA_BITS


def upper_edges() -> np.ndarray:
    """Return the upper edge of each bin, float32 `[bins]`; the last is infinite."""
    bits = (np.arange(1, BINS + 1, dtype=np.uint32) + np.uint32(_OFFSET)) << np.uint32(_SHIFT)
    edges = bits.view(np.float32)
    edges[-1] = np.inf
    return edges


@pytree
class HistogramObserver:
    """Counts of values by magnitude per scale, and amax.

    A bin is the exponent of a float32 and the first 5 bits of its mantissa: 32 equal parts of every
    octave from 2**-16 to 2**16, so the edges of a bin differ by a factor of at most 33/32. The
    first bin also counts all smaller magnitudes, the last all larger ones.
    """

    amax: PerScale
    counts: Int[Array | np.ndarray, "layers kinds heads channels bins"]

    @classmethod
    def empty(cls, shape: ScaleShape) -> "HistogramObserver":
        """Return the statistics of no values."""
        counts = jnp.zeros((*shape.shape, BINS), jnp.int32)
        return cls(jnp.zeros(shape.shape, jnp.float32), counts)

    def update(self, layer: Layer, x: Block, valid: Valid) -> "HistogramObserver":
        """See `Observer`."""
        bins = jnp.clip((_magnitude_bits(x) >> _SHIFT).astype(jnp.int32) - _OFFSET, 0, BINS - 1)
        kinds = jnp.arange(2, dtype=jnp.int32)[:, None, None, None]
        heads = jnp.arange(self.counts.shape[2], dtype=jnp.int32)[:, None]
        channels = jnp.arange(self.counts.shape[3], dtype=jnp.int32)
        one = jnp.broadcast_to(valid[:, None, None], x.shape).astype(jnp.int32)
        counts = jnp.asarray(self.counts).at[layer, kinds, heads, channels, bins].add(one)
        return HistogramObserver(_update_amax(self.amax, layer, x, valid), counts)

    def to_host(self) -> "HistogramObserver":
        """See `Observer`."""
        return HistogramObserver(np.asarray(self.amax), np.asarray(self.counts, np.int64))

    def reset(self) -> "HistogramObserver":
        """See `Observer`."""
        return HistogramObserver(jnp.zeros_like(self.amax), jnp.zeros_like(self.counts))

    def max_tokens(self, shape: ScaleShape) -> int:
        """See `Observer`. Counts are int32 on the device."""
        return (2**31 - 1) // shape.values_per_token

    def merge(self, other: "HistogramObserver") -> "HistogramObserver":
        """See `Observer`."""
        return HistogramObserver(np.maximum(self.amax, other.amax), self.counts + other.counts)

    def percentile(self, percent: float) -> np.ndarray:
        """Return an upper bound on the `percent`-th percentile of the magnitudes, per scale.

        With `v` for the exact percentile, `v <= bound <= v * 33/32` for `v` from 2**-16 to 2**16.
        Below that range the bound is at most `2**-16 * 33/32`. The bound never exceeds amax.
        """
        seen = np.cumsum(self.counts, axis=-1)
        total = int(seen.flat[-1])  # the same for every scale
        rank = math.ceil(Fraction(str(percent)) / 100 * total)
        bins = np.argmax(seen >= max(rank, 1), axis=-1)
        return np.asarray(np.minimum(upper_edges()[bins], self.amax))

    def scales(self, fmt: KVFormat, percent: float) -> np.ndarray:
        """Return the scales that map the percentile to the largest finite value of `fmt`."""
        return scales_from_amax(self.percentile(percent), fmt)


# -- mse -------------------------------------------------------------------------------------------

STEPS_PER_OCTAVE = 8
CANDIDATES = 25  # from amax / largest in steps of 1/8 octave down to 1/8 of it
QUANTUM = 2.0**-30  # host errors are multiples of this fraction of the squared amax


@pytree
class MSEObserver:
    """For each candidate scale, the squared quantization error relative to the squared amax.

    Host sums are int64 multiples of `QUANTUM`, so their order does not matter. That rounds by at
    most 2**-31 of a squared amax per block.
    """

    candidates: PerCandidate
    inverses: PerCandidate
    inverse_amax: PerScale  # makes the errors of different scales comparable
    sums: (
        Float32[Array, "candidates layers kinds heads channels"]
        | Int[np.ndarray, "candidates layers kinds heads channels"]
    )
    fmt: KVFormat = static()

    @classmethod
    def of(cls, first_pass: AmaxObserver, fmt: KVFormat) -> "MSEObserver":
        """Return the statistics of no values, with candidates from the amax of a first pass."""
        steps = np.exp2(-np.arange(CANDIDATES) / STEPS_PER_OCTAVE).reshape(-1, 1, 1, 1, 1)
        largest = first_pass.scales(fmt).astype(np.float64)
        candidates = np.maximum(largest * steps, SMALLEST_NORMAL).astype(np.float32)
        amax = np.asarray(first_pass.amax)
        inverse_amax = 1 / np.where(amax < SMALLEST_NORMAL, np.float32(1), amax)
        return cls(
            jnp.asarray(candidates),
            jnp.asarray(1 / candidates),
            jnp.asarray(inverse_amax),
            jnp.asarray(np.zeros_like(candidates)),
            fmt=fmt,
        )

    def update(self, layer: Layer, x: Block, valid: Valid) -> "MSEObserver":
        """See `Observer`."""
        x = x.astype(jnp.float32)

        def error(candidate: tuple[Array, Array]) -> Array:
            scale, inverse = (each[:, None] for each in candidate)  # [kinds, 1, heads, channels]
            stored = decode(encode(x * inverse, self.fmt), self.fmt) * scale
            relative = (x - stored) * self.inverse_amax[layer][:, None]
            squared = jnp.where(valid[:, None, None], relative * relative, 0.0)
            return _reduce(jnp.sum, squared, self.inverse_amax)

        new = lax.map(error, (self.candidates[:, layer], self.inverses[:, layer]))
        return dataclasses.replace(self, sums=jnp.asarray(self.sums).at[:, layer].add(new))

    def to_host(self) -> "MSEObserver":
        """See `Observer`."""
        sums = np.rint(np.asarray(self.sums, np.float64) / QUANTUM).astype(np.int64)
        return MSEObserver(
            np.asarray(self.candidates),
            np.asarray(self.inverses),
            np.asarray(self.inverse_amax),
            sums,
            fmt=self.fmt,
        )

    def reset(self) -> "MSEObserver":
        """See `Observer`."""
        return dataclasses.replace(self, sums=jnp.zeros_like(self.sums))

    def max_tokens(self, shape: ScaleShape) -> int:
        """See `Observer`."""
        return 0

    def merge(self, other: "MSEObserver") -> "MSEObserver":
        """See `Observer`."""
        return dataclasses.replace(self, sums=self.sums + other.sums)

    def scales(self) -> np.ndarray:
        """Return the candidates with the smallest error, the largest scale on ties."""
        best = np.argmin(self.sums, axis=0)
        return np.asarray(np.take_along_axis(np.asarray(self.candidates), best[None], axis=0)[0])


def _magnitude_bits(x: Float[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """Return the float32 bits of `|x|`, which have the order of the magnitudes, NaN last.

    A maximum of floats can lose a NaN on a CPU; a maximum of these bits cannot.
    """
    bits: Array = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.bitwise_and(bits, jnp.uint32(0x7FFFFFFF))


def _reduce(
    reduce: Callable[..., Array],
    x: Shaped[Array, "kinds tokens kv_heads head_dim"],
    like: Array | np.ndarray,
) -> Array:
    """Reduce over tokens, and over the axes that share a scale: `[kinds, heads, channels]`.

    Axes of `like` that share a scale have size 1.
    """
    over = [1, *(axis for axis in (2, 3) if like.shape[axis] == 1)]
    return jnp.squeeze(reduce(x, axis=tuple(over), keepdims=True), axis=1)
