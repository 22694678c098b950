"""What calibration keeps of the keys and values it sees: frozen statistics, updated by a block at a time.

`AmaxObserver` is the largest magnitude (observer "amax"); `MeanObserver` adds the sum of values, for K offsets; `HistogramObserver` adds counts by
magnitude ("percentile"); `MSEObserver` holds, for each of a few candidate scales, the squared error of storing every value under it
("mse").

Merging is exact in any order: a maximum, and sums of integers. On the device a statistic is float32 and int32; `host` gives the
same statistic in NumPy with 64-bit integers, and it is those that are merged and turned into scales.

Axes: `kinds` is 2, K then V. `heads` is `kv_heads`, or 1 where heads share a scale; `channels` is `head_dim`, or 1 likewise.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt32

from jfp8kv.cache.pool import Layer
from jfp8kv.core.formats import KVFormat, decode, encode
from jfp8kv.core.pytree import pytree, static

GRANULARITIES = ("tensor", "head", "channel")
Block = Float[Array, "kinds tokens kv_heads head_dim"]
Real = Bool[Array, " tokens"]
Each = Float32[Array | np.ndarray, "layers kinds heads channels"]
EachCandidate = Float32[Array | np.ndarray, "candidates layers kinds heads channels"]
S = TypeVar("S", bound="AmaxObserver | HistogramObserver | MSEObserver")

SMALLEST_NORMAL = (
    2.0**-126
)  # of float32: below it an inverse is infinite, and some processors take it for zero


@dataclasses.dataclass(frozen=True)
class ScaleShape:
    """The sizes of a model and what shares one scale in it."""

    layers: int
    kv_heads: int
    head_dim: int
    granularity: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[layers, kinds, heads, channels]`."""
        heads = 1 if self.granularity == "tensor" else self.kv_heads
        return self.layers, 2, heads, self.head_dim if self.granularity == "channel" else 1

    @property
    def values_per_token(self) -> int:
        """Values of one token that one scale covers."""
        return self.kv_heads * self.head_dim // math.prod(self.shape[2:])


def to_scales(peak: np.ndarray, fmt: KVFormat) -> np.ndarray:
    """The float32 scale under which `peak` becomes the largest finite value of `fmt`.

    Where nothing but zeros was seen (or what float32 calls subnormal) it is 1, under which zeros are as good and a value that
    turns up later is stored as it is. No scale is below 2**-126, whose inverse is still finite.
    """
    peak = np.asarray(peak, np.float64)
    scale = np.where(peak < SMALLEST_NORMAL, 1.0, np.maximum(peak / fmt.largest, SMALLEST_NORMAL))
    return scale.astype(np.float32)


# -- amax ---------------------------------------------------------------------------------------------------------------


@pytree
class AmaxObserver:
    """The largest magnitude of each unit; NaN or infinite once such a value was seen."""

    amax: Each

    @classmethod
    def empty(cls, units: ScaleShape) -> "AmaxObserver":
        return cls(jnp.zeros(units.shape, jnp.float32))

    def update(self, layer: Layer, x: Block, real: Real) -> "AmaxObserver":
        """With the keys and values `x` of `layer`; tokens that are not `real` are padding and never count."""
        magnitude = jnp.where(real[:, None, None], _magnitude_bits(x), jnp.uint32(0))
        new = jnp.maximum(
            _magnitude_bits(self.amax[layer]), _over_units(jnp.max, magnitude, self.amax)
        )
        return AmaxObserver(self.amax.at[layer].set(lax.bitcast_convert_type(new, jnp.float32)))

    def host(self) -> "AmaxObserver":
        return AmaxObserver(np.asarray(self.amax))

    def cleared(self) -> "AmaxObserver":
        """The same with nothing seen."""
        return AmaxObserver(jnp.zeros_like(self.amax))

    def room(self, units: ScaleShape) -> int:
        """Tokens this may see before it must be taken to the host."""
        return sys.maxsize

    def merge(self, other: "AmaxObserver") -> "AmaxObserver":
        return AmaxObserver(np.maximum(self.amax, other.amax))

    def wider(self, by: np.ndarray) -> "AmaxObserver":
        """The same for keys that may lie farther out, by so much `[layers, heads, channels]`; values stay."""
        amax = np.array(self.amax)
        amax[:, 0] += by
        return AmaxObserver(amax)

    def shared(self, units: ScaleShape) -> "AmaxObserver":
        """The same where more values share a scale."""
        over = tuple(axis for axis in (2, 3) if units.shape[axis] == 1)
        return AmaxObserver(np.max(self.amax, axis=over, keepdims=True, initial=0))

    def scales(self, fmt: KVFormat, headroom: float = 1.0) -> np.ndarray:
        """`headroom * amax / largest`, float32, of the shape of `amax`."""
        return to_scales(np.asarray(self.amax, np.float64) * headroom, fmt)


# -- means --------------------------------------------------------------------------------------------------------------

SUM_QUANTUM = (
    2.0**-24
)  # sums are kept as whole multiples of this: an error of at most 2**-25 per block, whatever the order


@pytree
class MeanObserver:
    """The sum of each unit's values. On the host, int64 multiples of `SUM_QUANTUM`."""

    peaks: AmaxObserver
    sums: Each | Int[np.ndarray, "layers kinds heads channels"]

    @classmethod
    def empty(cls, units: ScaleShape) -> "MeanObserver":
        return cls(AmaxObserver.empty(units), jnp.zeros(units.shape, jnp.float32))

    def update(self, layer: Layer, x: Block, real: Real) -> "MeanObserver":
        new = _over_units(
            jnp.sum, jnp.where(real[:, None, None], x.astype(jnp.float32), 0.0), self.sums
        )
        return MeanObserver(self.peaks.update(layer, x, real), self.sums.at[layer].add(new))

    def host(self) -> "MeanObserver":
        peaks, sums = self.peaks.host(), np.asarray(self.sums, np.float64)
        sums = np.where(
            np.isfinite(peaks.amax), sums, 0.0
        )  # what is not finite is refused by its peak
        return MeanObserver(peaks, np.rint(sums / SUM_QUANTUM).astype(np.int64))

    def cleared(self) -> "MeanObserver":
        return MeanObserver(self.peaks.cleared(), jnp.zeros_like(self.sums))

    def room(self, units: ScaleShape) -> int:
        return 0

    def merge(self, other: "MeanObserver") -> "MeanObserver":
        return MeanObserver(self.peaks.merge(other.peaks), self.sums + other.sums)

    def mean(self, tokens: int) -> np.ndarray:
        """Of keys, over so many tokens: float32 `[layers, heads, channels]`. For units of a channel each."""
        return (self.sums[:, 0] * SUM_QUANTUM / tokens).astype(np.float32)


# -- percentile ---------------------------------------------------------------------------------------------------------

LOWEST_OCTAVE, OCTAVES, PART_BITS = -16, 32, 5
BINS = OCTAVES << PART_BITS
_SHIFT, _OFFSET = 23 - PART_BITS, (127 + LOWEST_OCTAVE) << PART_BITS


def upper_edges() -> np.ndarray:
    """Where each bin ends, float32 `[bins]`; the last has no end."""
    bits = (np.arange(1, BINS + 1, dtype=np.uint32) + np.uint32(_OFFSET)) << np.uint32(_SHIFT)
    edges = bits.view(np.float32)
    edges[-1] = np.inf
    return edges


@pytree
class HistogramObserver:
    """How many values of each unit have which magnitude, and the largest.

    A bin is the exponent of a float32 and the first 5 bits of its mantissa: every octave from 2**-16 to 2**16 in 32 equal
    parts, so the ends of a bin differ by a factor of at most 33/32. The first bin also has all below, the last all above.
    """

    peaks: AmaxObserver
    counts: Int[Array | np.ndarray, "layers kinds heads channels bins"]

    @classmethod
    def empty(cls, units: ScaleShape) -> "HistogramObserver":
        return cls(AmaxObserver.empty(units), jnp.zeros((*units.shape, BINS), jnp.int32))

    def update(self, layer: Layer, x: Block, real: Real) -> "HistogramObserver":
        bins = jnp.clip((_magnitude_bits(x) >> _SHIFT).astype(jnp.int32) - _OFFSET, 0, BINS - 1)
        kinds, heads, channels = (
            jnp.arange(size, dtype=jnp.int32).reshape([-1 if axis == i else 1 for axis in range(4)])
            for i, size in ((0, 2), (2, self.counts.shape[2]), (3, self.counts.shape[3]))
        )
        one = jnp.broadcast_to(real[:, None, None], x.shape).astype(jnp.int32)
        counts = self.counts.at[layer, kinds, heads, channels, bins].add(one)
        return HistogramObserver(self.peaks.update(layer, x, real), counts)

    def host(self) -> "HistogramObserver":
        return HistogramObserver(self.peaks.host(), np.asarray(self.counts, np.int64))

    def cleared(self) -> "HistogramObserver":
        return HistogramObserver(self.peaks.cleared(), jnp.zeros_like(self.counts))

    def room(self, units: ScaleShape) -> int:
        return (2**31 - 1) // units.values_per_token

    def merge(self, other: "HistogramObserver") -> "HistogramObserver":
        return HistogramObserver(self.peaks.merge(other.peaks), self.counts + other.counts)

    def percentile(self, percent: float) -> np.ndarray:
        """An upper bound on the least magnitude that `percent` % of all do not exceed, float32, of the shape of `amax`.

        With `v` for that value, it is `v <= bound <= v * 33/32` for `v` from 2**-16 to 2**16; below, `bound` is at most
        `2**-16 * 33/32`, and above it is the largest value seen, which `bound` never exceeds.
        """
        seen = np.cumsum(self.counts, axis=-1)
        rank = math.ceil(
            Fraction(str(percent)) / 100 * int(seen.flat[-1])
        )  # the same for all units
        bins = np.argmax(seen >= max(rank, 1), axis=-1)
        return np.minimum(upper_edges()[bins], self.peaks.amax)

    def scales(self, fmt: KVFormat, percent: float) -> np.ndarray:
        return to_scales(self.percentile(percent), fmt)


# -- mse ----------------------------------------------------------------------------------------------------------------

STEPS_PER_OCTAVE, CANDIDATES = (
    8,
    25,
)  # from amax / largest down by eighths of an octave to an eighth of it
QUANTUM = (
    2.0**-30
)  # errors are added up as whole multiples of this share of the unit's squared peak


@pytree
class MSEObserver:
    """For each candidate scale, the sum of squared errors of what the cache would give back, over the unit's squared peak.

    On the host the sums are int64 multiples of `QUANTUM`, so that their order does not matter: a rounding of at most
    2**-31 of a squared peak per block.
    """

    candidates: EachCandidate
    inverses: EachCandidate
    per_peak: Each  # one over the unit's peak, which puts all units on one footing
    sums: (
        Float32[Array, "candidates layers kinds heads channels"]
        | Int[np.ndarray, "candidates layers kinds heads channels"]
    )
    fmt: KVFormat = static()

    @classmethod
    def of(cls, peaks: AmaxObserver, fmt: KVFormat) -> "MSEObserver":
        """Nothing seen yet, with candidates from what a first pass found."""
        finest = np.exp2(-np.arange(CANDIDATES) / STEPS_PER_OCTAVE).reshape(-1, 1, 1, 1, 1)
        candidates = np.maximum(
            peaks.scales(fmt).astype(np.float64) * finest, SMALLEST_NORMAL
        ).astype(np.float32)
        amax = np.asarray(peaks.amax)
        per_peak = 1 / np.where(amax < SMALLEST_NORMAL, np.float32(1), amax)
        arrays = (candidates, 1 / candidates, per_peak, np.zeros_like(candidates))
        return cls(*map(jnp.asarray, arrays), fmt=fmt)

    def update(self, layer: Layer, x: Block, real: Real) -> "MSEObserver":
        x = x.astype(jnp.float32)

        def error(scale_inverse: tuple[Array, Array]) -> Array:
            scale, inverse = (
                each[:, None] for each in scale_inverse
            )  # [kinds, 1, heads, channels]
            stored = decode(encode(x * inverse, self.fmt), self.fmt) * scale
            relative = (x - stored) * self.per_peak[layer][:, None]
            return _over_units(
                jnp.sum, jnp.where(real[:, None, None], relative * relative, 0.0), self.per_peak
            )

        new = lax.map(error, (self.candidates[:, layer], self.inverses[:, layer]))
        return dataclasses.replace(self, sums=self.sums.at[:, layer].add(new))

    def host(self) -> "MSEObserver":
        sums = np.rint(np.asarray(self.sums, np.float64) / QUANTUM).astype(np.int64)
        return MSEObserver(
            *map(np.asarray, (self.candidates, self.inverses, self.per_peak)), sums, fmt=self.fmt
        )

    def cleared(self) -> "MSEObserver":
        return dataclasses.replace(self, sums=jnp.zeros_like(self.sums))

    def room(self, units: ScaleShape) -> int:
        return 0

    def merge(self, other: "MSEObserver") -> "MSEObserver":
        return dataclasses.replace(self, sums=self.sums + other.sums)

    def scales(self) -> np.ndarray:
        """The candidate of least error, the largest one of several; float32 `[layers, kinds, heads, channels]`."""
        best = np.argmin(self.sums, axis=0)
        return np.take_along_axis(np.asarray(self.candidates), best[None], axis=0)[0]


def _magnitude_bits(x: Float[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """The float32 bits of `|x|`, in the order of magnitudes, NaN above all: a maximum of floats may lose one on a CPU."""
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def _over_units(
    reduce: Callable, x: Shaped[Array, "kinds tokens kv_heads head_dim"], like: Any
) -> Array:
    """`reduce` over tokens and over whatever shares a scale: `[kinds, heads, channels]` for units of the shape of `like`."""
    over = [1, *(axis for axis in (2, 3) if like.shape[axis] == 1)]
    return jnp.squeeze(reduce(x, axis=tuple(over), keepdims=True), axis=1)
