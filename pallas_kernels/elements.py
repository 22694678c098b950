"""Stored elements inside kernels: bits to the type that is multiplied, and float32 to bits.

FP8 is converted to float16, in which both formats are exact, and never to bfloat16: on Hopper the first is half an instruction
an element, the second goes through a pipe that is sixteen times slower. GPUs before compute capability 8.9 have no instruction
for E4M3: there its bits are shifted into place.

Float32 is converted to FP8 on its bits, which every GPU and the interpreter do alike. A minimum or maximum of floats would not:
Triton's forget NaN.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from pallas_kernels.backend import assembly

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BFLOAT16, FLOAT16, FLOAT32 = (
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(np.float16),
    np.dtype(np.float32),
)
ELEMENTS = (E4M3, E5M2, BFLOAT16, FLOAT16, FLOAT32)

ABSOLUTE, INFINITY = 0x7FFFFFFF, 0x7F800000  # bits of a float32: all but its sign, and its exponent


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


def decode_pairs(
    pairs: jax.Array, element: np.dtype, *, native_e4m3: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Float16 values of the low and of the high bytes of uint16, exact for every FP8 code.

    A register holds the same two channels of two keys, and is wanted as one channel of both, twice. By itself the compiler takes
    five instructions where one permutation does.
    """
    if interpret or (element == E4M3 and not native_e4m3):
        low, high = (((pairs >> shift) & jnp.uint16(0xFF)).astype(jnp.uint8) for shift in (0, 8))
        return decode(low, element, native_e4m3=native_e4m3), decode(
            high, element, native_e4m3=native_e4m3
        )
    if element == E4M3:
        asm = (
            "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, $3, %s; mov.b32 {a, b}, t; "
            "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
        )
        orders, constraints, pack = ("0x6420", "0x7531"), "=r,=r,r,r", 4
    else:
        asm, orders, constraints, pack = "prmt.b32 $0, $1, 0, %s;", ("0x2404", "0x3414"), "=r,r", 2
    low, high = (
        assembly(asm % order, pairs, FLOAT16, constraints=constraints, pack=pack)
        for order in orders
    )
    return low, high


def _e4m3_from_bits(bits: jax.Array) -> jax.Array:
    """The 7 magnitude bits lie in a float16 as they are, 2**8 too small; NaN alone needs another exponent."""
    bits = lax.bitcast_convert_type(bits, jnp.uint8).astype(jnp.uint16)
    magnitude = bits & jnp.uint16(0x7F)
    half = ((bits & jnp.uint16(0x80)) << 8) | (magnitude << 7)
    half = jnp.where(magnitude == jnp.uint16(0x7F), jnp.uint16(0x7E00), half)
    return lax.bitcast_convert_type(half, jnp.float16) * jnp.float16(256)


def encode(x: jax.Array, element: np.dtype) -> jax.Array:
    """Bits of the value of `element` nearest to float32 `x`, ties to even, saturating at the largest finite one.

    The sign is kept, of zero and NaN too; any NaN becomes the quiet one. Float32 stays as it is.
    """
    if element == FLOAT32:
        return x
    size = 8 * element.itemsize
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & ABSOLUTE  # orders as the numbers do, NaN last
    clipped = jnp.minimum(magnitude, _largest(element))
    if is_fp8(element):
        code = _fp8_code(clipped, element)
    else:
        half = lax.bitcast_convert_type(clipped, jnp.float32).astype(element)
        code = lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.int32)
    quiet = int(np.array(np.nan, np.float32).astype(element).view(f"uint{size}")) & ~(
        1 << (size - 1)
    )
    code = jnp.where(magnitude > INFINITY, quiet, code)
    return (code | (bits >> (32 - size)) & (1 << (size - 1))).astype(f"uint{size}")


def _fp8_code(magnitude: jax.Array, element: np.dtype) -> jax.Array:
    """The code of finite magnitudes in range, given and returned as bits in int32.

    Adding `2 ** (e + drop)` to a number between `2 ** e` and the next power leaves the bits that fit, rounded by the adder, at
    the low end of the sum. Below the smallest normal number its `e` is taken: those sums count subnormals.
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
    """For each row of float32 `x`, the exponent, biased by 127, of the smallest power of two that brings it into range.

    At least 1, int32. Only finite values count: infinities saturate, NaN stays NaN, neither spoils its neighbours.
    """
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & ABSOLUTE
    most = jnp.max(jnp.where(magnitude < INFINITY, magnitude, 0), axis=-1)
    # The difference of exponents, and one more where the row's mantissa is the larger: a division by 2**23, rounded up.
    above = (most - _largest(element) + 0x7FFFFF) >> 23
    return jnp.maximum(above + 127, 1)


def _largest(element: np.dtype) -> int:
    """The largest finite value, as the bits of a float32."""
    return int(np.float32(ml_dtypes.finfo(element).max).view(np.int32))


def power(exponent: jax.Array) -> jax.Array:
    """`2 ** exponent` in float32 for int32 exponents of -126 .. 127; smaller ones give 2**-126."""
    return lax.bitcast_convert_type((jnp.maximum(exponent, -126) + 127) << 23, jnp.float32)
