"""Element formats of the KV cache, and the cast into them.

An 8-bit float has 1 sign, E exponent and M mantissa bits. OCP 8-bit Floating Point 1.0 (2023)
defines E4M3 (largest finite value 448, no infinity, one NaN code per sign; `float8_e4m3fn`) and
E5M2 (IEEE-like: largest finite value 57344, infinities, NaNs).

**The cast** clips, rounds to nearest (ties to even) and stores. `astype` alone would turn a large
value into NaN or infinity. XLA on every backend, the kernels (pallas_kernels/fp8.py) and NumPy
(`encode_numpy`) agree on every code.

**Stored arrays are bits** (`uint8`, `uint16`), not floats. XLA:CPU has no float8 or bfloat16
slices, gathers or scatters. It converts the *whole* array to a wider type at each one, which makes
a small write into a large cache 500,000 times slower (docs/log.md). Bits are moved unchanged; only
the tile in use is decoded.

`decode_tile` returns E4M3 values too small by a factor of 2**8 (`KVFormat.tile_factor`), which
callers fold into a scale: one shift puts the 7 magnitude bits into a float16, exact for subnormals
too. The full conversion takes many instructions.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jfp8kv.core.errors import invalid_choice
from jfp8kv.core.types import KV_DTYPES
from pallas_kernels import fp8


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """One element format of the cache.

    Attributes:
      name: the `kv_dtype` that users write.
      dtype: the type of the values.
      storage_dtype: the type of the arrays in memory.
      exponent_bits, mantissa_bits: of one element.
      largest: the largest finite value.
      tile_factor: what the result of `decode_tile` must be multiplied by.
    """

    name: str
    dtype: np.dtype
    storage_dtype: np.dtype
    exponent_bits: int
    mantissa_bits: int
    largest: float
    tile_factor: float = 1.0

    @property
    def is_fp8(self) -> bool:
        """Whether elements have 8 bits."""
        return self.dtype.itemsize == 1

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    @property
    def bias(self) -> int:
        """The exponent bias."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal value."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def nan_code(self) -> int:
        """A code that decodes to NaN: tests fill unwritten slots with it."""
        return {1: 0x7F, 2: 0x7FFF}.get(self.itemsize, 0)


def _format(
    name: str,
    dtype: type,
    storage_dtype: type,
    exponent_bits: int,
    mantissa_bits: int,
    tile_factor: float = 1.0,
) -> KVFormat:
    return KVFormat(
        name,
        np.dtype(dtype),
        np.dtype(storage_dtype),
        exponent_bits,
        mantissa_bits,
        largest=float(ml_dtypes.finfo(dtype).max),
        tile_factor=tile_factor,
    )


E4M3 = _format("fp8_e4m3", ml_dtypes.float8_e4m3fn, np.uint8, 4, 3, fp8.E4M3_FACTOR)
E5M2 = _format("fp8_e5m2", ml_dtypes.float8_e5m2, np.uint8, 5, 2)
BFLOAT16 = _format("bfloat16", ml_dtypes.bfloat16, np.uint16, 8, 7)
FLOAT16 = _format("float16", np.float16, np.uint16, 5, 10)
FLOAT32 = _format("float32", np.float32, np.float32, 8, 23)

FORMATS = {f.name: f for f in (BFLOAT16, FLOAT16, FLOAT32, E4M3, E5M2)}


def kv_format(name: object) -> KVFormat:
    """Return the format called `name`; "fp8" is "fp8_e4m3". Raises `ConfigError` with the list."""
    if name == "fp8":
        return E4M3
    if not isinstance(name, str) or name not in FORMATS:
        raise invalid_choice("kv_dtype", name, KV_DTYPES)
    return FORMATS[name]


def encode(x: Float[Array, "*dims"], fmt: KVFormat) -> Array:
    """Return the stored bits of the nearest values, saturating at the largest finite value.

    Ties go to even. NaN stays NaN, and zero keeps its sign.
    Source: OCP OFP8 1.0, section 5 (saturating mode).
    """
    return fp8.encode(x.astype(jnp.float32), fmt.dtype)


def encode_numpy(x: np.ndarray, fmt: KVFormat) -> np.ndarray:
    """Return `encode(x, fmt)` computed by ml_dtypes. The compiled casts are tested against it."""
    x = np.asarray(x, np.float32)
    return np.clip(x, -fmt.largest, fmt.largest).astype(fmt.dtype).view(fmt.storage_dtype)


def decode_tile(bits: Array, fmt: KVFormat) -> Float[Array, "*dims"]:
    """Return float32 values *divided by* `fmt.tile_factor`: exact, and NaN stays NaN."""
    if fmt is FLOAT32:
        return bits
    if fmt is BFLOAT16:
        return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    half = bits
    if fmt is E5M2:
        half = bits.astype(jnp.uint16) << 8
    elif fmt is E4M3:
        half = fp8.e4m3_as_half(bits)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)


def decode(bits: Array, fmt: KVFormat) -> Float[Array, "*dims"]:
    """Return the float32 values of stored bits, exact for every code."""
    tile = decode_tile(bits, fmt)
    return tile if fmt.tile_factor == 1.0 else tile * jnp.float32(fmt.tile_factor)


def split_bytes(bits: Array) -> list[Array]:
    """Return the bytes of stored elements, high to low, as uint8 arrays."""
    if bits.dtype == jnp.float32:
        bits = lax.bitcast_convert_type(bits, jnp.uint32)
    return [(bits >> (8 * i)).astype(jnp.uint8) for i in reversed(range(bits.dtype.itemsize))]


def join_bytes(parts: Sequence[Array], fmt: KVFormat) -> Array:
    """Return the stored elements of `fmt` with these bytes: the inverse of `split_bytes`."""
    bits = parts[0].astype(jnp.uint32)
    for part in parts[1:]:
        bits = (bits << 8) | part.astype(jnp.uint32)
    if fmt is FLOAT32:
        return lax.bitcast_convert_type(bits, jnp.float32)
    return bits.astype(fmt.storage_dtype)


def as_values(bits: Array, fmt: KVFormat) -> Array:
    """Return a copy of stored bits as their value type (`float8_e4m3fn`, ...), for inspection."""
    return bits if fmt is FLOAT32 else lax.bitcast_convert_type(bits, fmt.dtype)
