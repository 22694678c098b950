"""Stored elements inside kernels: bits to the type that is multiplied, and float32 to bits.

FP8 is converted to float16, in which both formats are exact, and never to bfloat16: on Hopper the first is half an instruction
an element, the second goes through a pipe that is sixteen times slower. GPUs before compute capability 8.9 have no instruction
for E4M3: there its bits are shifted into place.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
ELEMENTS = (E4M3, E5M2, BFLOAT16, FLOAT16, FLOAT32)


def is_fp8(element: np.dtype) -> bool:
    return element.itemsize == 1


def multiplied_in(element: np.dtype, query: np.dtype) -> np.dtype:
    """The type both products have their operands in: float32 queries keep float32 products, 16-bit ones use tensor cores."""
    if FLOAT32 in (query, element):
        return FLOAT32
    return FLOAT16 if is_fp8(element) else element


def decode(bits: jax.Array, element: np.dtype, *, native_e4m3: bool) -> jax.Array:
    """Values of stored bits, exact for every code: FP8 as float16, others as what they are."""
    if element == E4M3 and not native_e4m3:
        values = _e4m3_from_bits(bits)
    elif bits.dtype == element:
        values = bits
    else:
        values = lax.bitcast_convert_type(bits, element)
    return values.astype(FLOAT16) if is_fp8(element) else values


def _e4m3_from_bits(bits: jax.Array) -> jax.Array:
    """The 7 magnitude bits lie in a float16 as they are, 2**8 too small; NaN alone needs another exponent."""
    bits = lax.bitcast_convert_type(bits, jnp.uint8).astype(jnp.uint16)
    magnitude = bits & jnp.uint16(0x7F)
    half = ((bits & jnp.uint16(0x80)) << 8) | (magnitude << 7)
    half = jnp.where(magnitude == jnp.uint16(0x7F), jnp.uint16(0x7E00), half)
    return lax.bitcast_convert_type(half, jnp.float16) * jnp.float16(256)


def power(exponent: jax.Array) -> jax.Array:
    """`2 ** exponent` in float32 for int32 exponents of -126 .. 127; smaller ones give 2**-126."""
    return lax.bitcast_convert_type((jnp.maximum(exponent, -126) + 127) << 23, jnp.float32)
