"""Interface to Pallas-Triton: the primitives that kernels use, and their launch.

Pallas-Triton is deprecated since jax 0.11 in favour of Mosaic GPU, whose API still changes between
releases. Kernels use only the functions below: another compiler needs another version of this file.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.fp8 import E4M3, FLOAT16, decode

Refs = dict[str, Any]  # kernel arguments by name


class NotSupported(Exception):
    """The kernels do not support these arguments or this device.

    The message says what they do support. Callers fall back to XLA.
    """


@functools.cache
def pallas() -> Any:
    """Return `jax.experimental.pallas`, imported on first use: only GPUs need it."""
    from jax.experimental import pallas

    return pallas


@functools.cache
def _triton() -> Any:
    from jax.experimental.pallas import triton

    return triton


def program(axis: int) -> jax.Array:
    """Return the index of this program along a grid axis."""
    return pallas().program_id(axis)


def cdiv(a: Any, b: Any) -> Any:
    """Return `a / b` rounded up, for nonnegative integers or integer arrays."""
    if isinstance(a, int) and isinstance(b, int):
        return (a + b - 1) // b
    return lax.div(a + (b - 1), b)


def load(
    ref: Any, *index: Any, mask: Any = None, other: Any = None, once: bool = False
) -> jax.Array:
    """Return elements of `ref` at broadcast integer indices, `other` where `mask` is false.

    `once`: the elements are not read again, so caches may evict them first.
    """
    policy = "evict_first" if once else None
    return _triton().load(
        ref.at[index], mask=mask, other=None if mask is None else other, eviction_policy=policy
    )


def store(ref: Any, *index: Any, value: jax.Array, mask: Any = None) -> None:
    """Write `value` at unique broadcast integer indices where `mask` is true."""
    _triton().store(ref.at[index], value, mask=mask)


def dot(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """Return `a @ b`, accumulated in float32.

    Tensor cores multiply float32 operands as three TF32 parts (error 2**-22; two parts would have
    2**-11). Interpret mode multiplies them directly.
    """
    precision = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def inline_asm(asm: str, x: jax.Array, dtype: Any, *, constraints: str, pack: int) -> jax.Array:
    """Apply PTX elementwise, to `pack` elements of a lane at a time. Not available interpreted."""
    shape = jax.ShapeDtypeStruct(x.shape, dtype)
    return _triton().elementwise_inline_asm(
        asm, args=[x], constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )[0]


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Return `2 ** x`, zero below 2**-126.

    One instruction. `jnp.exp2` takes four, to support subnormal numbers.
    """
    if interpret:
        return jnp.exp2(x)
    return inline_asm("ex2.approx.ftz.f32 $0, $1;", x, jnp.float32, constraints="=r,r", pack=1)


def decode_pairs(
    pairs: jax.Array, element: np.dtype, *, native_e4m3: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the float16 values of the low and of the high bytes of uint16, for all FP8 codes.

    A register holds the same two channels of two keys. The kernel needs one channel of both keys,
    twice. A single byte permutation does that; the compiler would emit five instructions.
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
        asm = "prmt.b32 $0, $1, 0, %s;"
        orders, constraints, pack = ("0x2404", "0x3414"), "=r,r", 2
    low, high = (
        inline_asm(asm % order, pairs, FLOAT16, constraints=constraints, pack=pack)
        for order in orders
    )
    return low, high


def launch(
    kernel: Callable[..., None],
    inputs: dict[str, Any],
    *,
    name: str,
    grid: tuple[int, ...],
    out: Any,
    warps: int,
    stages: int,
    interpret: bool,
    aliases: dict[str, str] | None = None,
) -> Any:
    """Run `kernel(refs, out_refs)` for every point of `grid` and return the outputs by name.

    Args:
      kernel: the kernel function.
      inputs: arrays by name; None is left out of `refs`.
      name: the name of the kernel in profiles and in machine code.
      grid: number of programs along each axis.
      out: shapes and dtypes of the outputs by name.
      warps: warps per program.
      stages: pipeline stages of asynchronous copies.
      interpret: run in interpret mode.
      aliases: inputs that are updated in place, with the output that replaces each.

    Raises `NotSupported` for an array that is too large for 32-bit offsets.
    """
    inputs = {key: value for key, value in inputs.items() if value is not None}
    if not interpret:
        for key, value in inputs.items():
            check_offsets(key, value)
    names = sorted(inputs)
    order = sorted(out)
    call = pallas().pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out,
        input_output_aliases={names.index(a): order.index(b) for a, b in (aliases or {}).items()},
        compiler_params=_triton().CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
    )
    return call(inputs)


def check_offsets(name: str, x: Any) -> None:
    """Raise `NotSupported` for arrays of 2 to 4 GiB with one byte per element.

    Element offsets are signed 32-bit integers for arrays of up to 2**32 bytes, and would wrap.
    Larger arrays have 64-bit offsets.
    """
    size, itemsize = math.prod(x.shape), np.dtype(x.dtype).itemsize
    if size > 2**31 and size * itemsize <= 2**32:
        raise NotSupported(
            f"{name} of {size / 2**30:.2f} GiB: Pallas-Triton's 32-bit offsets do not reach byte "
            "arrays between 2 and 4 GiB; use at most 2 GiB or more than 4 GiB."
        )


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`: array sizes in kernels are powers."""
    return 1 << max(0, n - 1).bit_length()
