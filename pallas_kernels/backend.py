"""The one place that knows Pallas-Triton: what kernels say to the hardware, and how they are launched.

Pallas-Triton is deprecated since jax 0.11 in favour of Mosaic GPU, which still changes from release to release. Kernels are
written against the few words below, so that another compiler means another version of this file.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.elements import E4M3, FLOAT16, decode
from pallas_kernels.errors import NotSupported


@functools.cache
def pallas() -> Any:
    """Return `jax.experimental.pallas`, imported on first use: machines without a GPU never need it."""
    from jax.experimental import pallas

    return pallas


@functools.cache
def _triton() -> Any:
    from jax.experimental.pallas import triton

    return triton


def program(axis: int) -> jax.Array:
    """Return the index of this program along an axis of the grid."""
    return pallas().program_id(axis)


def cdiv(a: Any, b: Any) -> Any:
    """Return `a / b` rounded up, for integers or arrays that are not negative."""
    if isinstance(a, int) and isinstance(b, int):
        return (a + b - 1) // b
    return lax.div(a + (b - 1), b)


def load(
    ref: Any, *index: Any, mask: Any = None, other: Any = None, once: bool = False
) -> jax.Array:
    """Elements of `ref` at broadcast integer indices, `other` where `mask` is false. `once`: need not stay in a cache."""
    policy = "evict_first" if once else None
    return _triton().load(
        ref.at[index], mask=mask, other=None if mask is None else other, eviction_policy=policy
    )


def store(ref: Any, *index: Any, value: jax.Array, mask: Any = None) -> None:
    """Write `value` at broadcast integer indices where `mask` holds; no place twice."""
    _triton().store(ref.at[index], value, mask=mask)


def dot(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """`a @ b` summed in float32. Float32 operands go through tensor cores in three parts (error 2**-22; two would be 2**-11),
    and as they are where the kernel is interpreted."""
    precision = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def assembly(asm: str, x: jax.Array, dtype: Any, *, constraints: str, pack: int) -> jax.Array:
    """PTX of one array of numbers, `pack` of a lane's at a time; never interpreted."""
    shape = jax.ShapeDtypeStruct(x.shape, dtype)
    return _triton().elementwise_inline_asm(
        asm, args=[x], constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )[0]


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """`2 ** x`, zero below 2**-126: one instruction, where the library's takes four to keep subnormal numbers."""
    if interpret:
        return jnp.exp2(x)
    return assembly("ex2.approx.ftz.f32 $0, $1;", x, jnp.float32, constraints="=r,r", pack=1)


def decode_pairs(
    pairs: jax.Array, element: np.dtype, *, native_e4m3: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Return float16 values of the low and the high bytes of uint16, exact for every FP8 code.

    A register holds the same two channels of two keys. The kernel needs one channel of both keys,
    twice. One byte permutation does that where the compiler by itself takes five instructions.
    """
    if interpret or (element == E4M3 and not native_e4m3):
        low = (pairs & jnp.uint16(0xFF)).astype(jnp.uint8)
        high = (pairs >> 8).astype(jnp.uint8)
        return (
            decode(low, element, native_e4m3=native_e4m3),
            decode(high, element, native_e4m3=native_e4m3),
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


def launch(
    kernel: Callable[..., None],
    operands: dict[str, Any],
    *,
    name: str,
    grid: tuple[int, ...],
    out: Any,
    warps: int,
    stages: int,
    interpret: bool,
    aliases: dict[str, str] | None = None,
) -> Any:
    """Run `kernel(refs, out_refs)` for every point of `grid`; `out` is a dict of shapes, and so is what comes back.

    Operands that are None are left out of `refs`. `aliases` names operands that outputs take the place of. Raises
    `NotSupported` for an operand whose elements 32-bit offsets do not reach.
    """
    operands = {key: value for key, value in operands.items() if value is not None}
    if not interpret:
        for key, value in operands.items():
            check_offsets(key, value)
    names = list(operands)
    order = sorted(out)
    call = pallas().pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out,
        input_output_aliases={
            sorted(names).index(a): order.index(b) for a, b in (aliases or {}).items()
        },
        compiler_params=_triton().CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
    )
    return call(operands)


def check_offsets(name: str, x: Any) -> None:
    """Raise `NotSupported` for arrays of 2 to 4 GiB with one byte per element.

    Offsets, in elements, are signed 32-bit numbers for arrays of up to 2**32 bytes, and would wrap; beyond they have 64 bits.
    """
    size, itemsize = math.prod(x.shape), np.dtype(x.dtype).itemsize
    if size > 2**31 and size * itemsize <= 2**32:
        raise NotSupported(
            f"{name} of {size / 2**30:.2f} GiB: arrays of bytes between 2 and 4 GiB are out of reach of Pallas-Triton's 32-bit "
            "offsets; take at most 2 GiB or more than 4."
        )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`: the sizes that arrays in a kernel have."""
    return 1 << max(0, n - 1).bit_length()
