"""The FP8 cast and its inverse, and the exponents of dynamic scales.

The kernels, XLA code and NumPy tests share this module. It imports nothing but JAX and NumPy.

`encode` clips, rounds to nearest (ties to even) and stores. `astype` alone would turn a large value
into NaN or infinity. It works on the bits of a float32, which every backend treats the same way: a
minimum or maximum of floats in Triton drops NaN.

Kernels decode FP8 to float16, in which both formats are exact, and not to bfloat16: on Hopper the
first takes half an instruction per element, the second uses a pipe that is 16 times slower. GPUs
before compute capability 8.9 have no instruction for E4M3: there its bits are shifted into place.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
ELEMENTS = (E4M3, E5M2, BFLOAT16, FLOAT16, FLOAT32)

E4M3_FACTOR = 2.0**8  # E4M3 bits in the place of float16 bits decode this much too small

ABSOLUTE, INFINITY = 0x7FFFFFFF, 0x7F800000  # float32 bits: all but the sign, and the exponent


def is_fp8(element: np.dtype) -> bool:
    """Return whether `element` is an 8-bit format."""
    return element.itemsize == 1


def compute_dtype(element: np.dtype, query: np.dtype) -> np.dtype:
    """Return the operand type of both matmuls: float32 if either input is, else 16 bits."""
    if FLOAT32 in (query, element):
        return FLOAT32
    return FLOAT16 if is_fp8(element) else element


def decode(bits: jax.Array, element: np.dtype, *, native_e4m3: bool) -> jax.Array:
    """Return the values of stored bits, exact for every code: FP8 as float16, others unchanged."""
    if element == E4M3 and not native_e4m3:
        bits = lax.bitcast_convert_type(bits, jnp.uint8)
        half = lax.bitcast_convert_type(e4m3_as_half(bits), jnp.float16)
        return half * jnp.float16(E4M3_FACTOR)
    values = bits if bits.dtype == element else lax.bitcast_convert_type(bits, element)
    return values.astype(FLOAT16) if is_fp8(element) else values


def e4m3_as_half(bits: jax.Array) -> jax.Array:
    """Return float16 bits (int16) of uint8 E4M3 codes, `E4M3_FACTOR` too small; NaN stays NaN.

    The 7 magnitude bits fit a float16, subnormals included. Sign extension sets bits 15 and 14:
    clearing bit 14 takes fewer steps than moving the sign alone.
    """
    wide = lax.bitcast_convert_type(bits, jnp.int8).astype(jnp.int16) << 7
    # Bit 14, set for magnitude 0x7F only: it makes the exponent all ones.
    nan = ((wide & jnp.int16(0x3F80)) + jnp.int16(0x80)) & jnp.int16(0x4000)
    return (wide & jnp.int16(~0x4000)) | nan


def encode(x: jax.Array, element: np.dtype) -> jax.Array:
    """Return the bits of the nearest value of `element`, saturating at its largest finite value.

    Ties go to even. The sign is preserved, also of zero and NaN; any NaN becomes the quiet NaN.
    Float32 is returned unchanged. Source: OCP OFP8 1.0, section 5 (saturating mode).

    Args:
      x: float32 values.
      element: one of `ELEMENTS`.
    """
    if element == FLOAT32:
        return x
    size = 8 * element.itemsize
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & ABSOLUTE  # ordered like the numbers, NaN last
    clipped = jnp.minimum(magnitude, _largest(element))
    if is_fp8(element):
        code = _fp8_code(clipped, element)
    else:
        half = lax.bitcast_convert_type(clipped, jnp.float32).astype(element)
        code = lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.int32)
    sign = 1 << (size - 1)
    quiet = int(np.array(np.nan, np.float32).astype(element).view(f"uint{size}")) & ~sign
    code = jnp.where(magnitude > INFINITY, quiet, code)
    return (code | (bits >> (32 - size)) & sign).astype(f"uint{size}")


def _fp8_code(magnitude: jax.Array, element: np.dtype) -> jax.Array:
    """Return the code of finite magnitudes in range, both as int32 bits.

    Adding `2 ** (e + drop)` to a number in `2 ** e .. 2 ** (e + 1)` leaves the mantissa bits that
    fit, rounded by the adder, at the low end of the sum. Below the smallest normal number `e` is
    the exponent of that number: those sums count subnormals.
    """
    info = ml_dtypes.finfo(element)
    drop = 23 - info.nmant
    smallest = int(np.float32(info.smallest_normal).view(np.int32))
    step = jnp.maximum(magnitude & INFINITY, smallest) + (drop << 23)
    total = lax.bitcast_convert_type(magnitude, jnp.float32) + lax.bitcast_convert_type(
        step, jnp.float32
    )
    significand = lax.bitcast_convert_type(total, jnp.int32) - step
    return significand + (step >> drop) - ((smallest + (drop << 23)) >> drop)


def token_head_exponent(x: jax.Array, element: np.dtype) -> jax.Array:
    """Return the exponents of dynamic scales, one per row of float32 `x`.

    Each is the exponent, biased by 127, of the smallest power of two `s` with
    `amax(|row|) <= largest * s`; at least 1, int32. The amax runs over finite values: infinities
    saturate and NaN stays NaN without changing other channels.
    """
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & ABSOLUTE
    finite = jnp.where(magnitude < INFINITY, magnitude, 0)
    # As floats: XLA:CPU reduces those four times as fast as integers.
    amax = jnp.max(lax.bitcast_convert_type(finite, jnp.float32), axis=-1)
    amax = lax.bitcast_convert_type(amax, jnp.int32)
    # The difference of the exponents, plus 1 where the row's mantissa is the larger one:
    # a division by 2**23, rounded up.
    above = (amax - _largest(element) + 0x7FFFFF) >> 23
    return jnp.maximum(above + 127, 1)


def _largest(element: np.dtype) -> int:
    """Return the float32 bits of the largest finite value."""
    return int(np.float32(ml_dtypes.finfo(element).max).view(np.int32))


def exact_exp2(exponent: jax.Array) -> jax.Array:
    """Return `2 ** exponent` in float32 for int32 exponents up to 127; at least 2**-126."""
    return lax.bitcast_convert_type((jnp.maximum(exponent, -126) + 127) << 23, jnp.float32)
