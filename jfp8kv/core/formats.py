"""Number formats a KV cache can hold, and the one cast into them.

An 8-bit float has 1 sign, E exponent and M mantissa bits. OCP 8-bit Floating Point 1.0 (2023) defines E4M3 (largest finite
value 448, no infinity, one NaN code a sign; `float8_e4m3fn`) and E5M2 (IEEE-like: largest finite 57344, infinities, NaNs).

**The cast** is clip, round to nearest (ties to even), store: `astype` alone would turn a large value into NaN or infinity.
It is written on the bits of a float32, so XLA on any backend, a kernel and NumPy (`encode_numpy`) agree on every code.

**Stored arrays hold bits** (`uint8`, `uint16`), not floats. XLA:CPU has no float8 or bfloat16 slices, gathers or scatters: it
converts the *whole* array to a wider type at each one, which makes a small write into a large cache 500,000 times slower
(docs/log.md). Bits are moved as they are; only the tile at hand is decoded.

`decode_tile` leaves E4M3 short by a factor of 2**8 (`KVFormat.tile_factor`), which callers fold into a scale: shifting the 7
magnitude bits into a float16 is one instruction, exact for subnormals too, where the full conversion is many.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jfp8kv.core.errors import invalid_choice
from jfp8kv.core.types import KV_DTYPES
from pallas_kernels import elements


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """One element format of the cache.

    `name` is what users write (`kv_dtype`); `dtype` the value type they see; `stored` the type of the arrays in memory.
    """

    name: str
    dtype: np.dtype
    stored: np.dtype
    exponent_bits: int
    mantissa_bits: int
    largest: float
    tile_factor: float = 1.0

    @property
    def is_fp8(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def nan_code(self) -> int:
        """A code that decodes to NaN: what tests fill unwritten slots with."""
        return {1: 0x7F, 2: 0x7FFF}.get(self.itemsize, 0)


def _format(
    name: str, dtype: object, stored: object, exponent_bits: int, mantissa_bits: int, **rest: float
) -> KVFormat:
    dtype = np.dtype(dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    return KVFormat(name, dtype, np.dtype(stored), exponent_bits, mantissa_bits, largest, **rest)


E4M3 = _format(
    "fp8_e4m3", ml_dtypes.float8_e4m3fn, np.uint8, 4, 3, tile_factor=elements.E4M3_FACTOR
)
E5M2 = _format("fp8_e5m2", ml_dtypes.float8_e5m2, np.uint8, 5, 2)
BFLOAT16 = _format("bfloat16", ml_dtypes.bfloat16, np.uint16, 8, 7)
FLOAT16 = _format("float16", np.float16, np.uint16, 5, 10)
FLOAT32 = _format("float32", np.float32, np.float32, 8, 23)

FORMATS = {f.name: f for f in (BFLOAT16, FLOAT16, FLOAT32, E4M3, E5M2)}


def kv_format(name: Any) -> KVFormat:
    """The format called `name`; "fp8" is "fp8_e4m3". Raises `ConfigError` with the list for anything else."""
    if name == "fp8":
        return E4M3
    if not isinstance(name, str) or name not in FORMATS:
        raise invalid_choice("kv_dtype", name, KV_DTYPES)
    return FORMATS[name]


def encode(x: Float[Array, "*dims"], fmt: KVFormat) -> Array:
    """Stored bits of the nearest representable value (ties to even), saturating at the format's largest finite value.

    NaN stays NaN and the sign of zero is kept. Source: OCP OFP8 1.0, section 5 (saturating mode).
    """
    return elements.encode(x.astype(jnp.float32), fmt.dtype)


def encode_numpy(x: np.ndarray, fmt: KVFormat) -> np.ndarray:
    """`encode` on the host, through ml_dtypes. The oracle the compiled casts are tested against."""
    x = np.asarray(x, np.float32)
    return np.clip(x, -fmt.largest, fmt.largest).astype(fmt.dtype).view(fmt.stored)


def decode_tile(bits: Array, fmt: KVFormat) -> Float[Array, "*dims"]:
    """float32 values *divided by* `fmt.tile_factor`, exact for every finite code; NaN codes give NaN."""
    if fmt is FLOAT32:
        return bits
    if fmt is BFLOAT16:
        return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    half = bits
    if fmt is E5M2:
        half = bits.astype(jnp.uint16) << 8
    elif fmt is E4M3:
        half = elements.e4m3_as_half(bits)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)


def decode(bits: Array, fmt: KVFormat) -> Float[Array, "*dims"]:
    """float32 values of stored bits, exact for every code."""
    tile = decode_tile(bits, fmt)
    return tile if fmt.tile_factor == 1.0 else tile * jnp.float32(fmt.tile_factor)


def split_planes(bits: Array) -> list[Array]:
    """The bytes of stored elements, from high to low, each an array of uint8. Float32 is seen as its bits."""
    if bits.dtype == jnp.float32:
        bits = lax.bitcast_convert_type(bits, jnp.uint32)
    return [(bits >> (8 * i)).astype(jnp.uint8) for i in reversed(range(bits.dtype.itemsize))]


def join_planes(planes: Sequence[Array], fmt: KVFormat) -> Array:
    """The stored elements of `fmt` whose bytes these are."""
    bits = planes[0].astype(jnp.uint32)
    for plane in planes[1:]:
        bits = (bits << 8) | plane.astype(jnp.uint32)
    return (
        lax.bitcast_convert_type(bits, jnp.float32) if fmt is FLOAT32 else bits.astype(fmt.stored)
    )


def as_values(bits: Array, fmt: KVFormat) -> Array:
    """The stored array seen as its value type (`float8_e4m3fn`, ...), for inspection. Copies."""
    return bits if fmt is FLOAT32 else jax.lax.bitcast_convert_type(bits, fmt.dtype)
