"""Matrix products with weights of a stack of layers, read tile by tile.

All layers of a decoder share one array per parameter, `[layers, out, in]`, so that `lax.scan` runs them with one traced body.
Indexing that array would first copy the layer's whole matrix, on XLA:CPU two to four times the cost of the product itself when
few rows are multiplied. So a matrix is taken in tiles of rows that stay in cache: copying a tile out of the stack and widening
it to float32 are one pass, and the product reads it from there (docs/log.md has the figures).

16-bit weights arrive as their bits (`uint16`, see `as_bits`) on the CPU, for the same reason as the KV cache does: XLA:CPU
would widen the whole stack at each slice of it.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

Matmul = Callable[..., Array]  # called as `stacked_matmul` is, and computes what it computes
TILE_BYTES = 1 << 20  # of a widened tile


def as_bits(weight: Array) -> Array:
    """A 16-bit float array in host memory as `uint16`, sharing its memory; other types as they are.

    A bitcast would copy, and NumPy's view of an array of JAX's is read-only, which DLPack cannot say: hence the detour.
    """
    if weight.dtype.itemsize != 2:
        return weight
    host = np.ascontiguousarray(np.asarray(weight))
    buffer: Any = (ctypes.c_uint16 * host.size).from_address(host.ctypes.data)
    buffer.owner = host  # whoever holds the view keeps the array alive
    return jnp.from_dlpack(np.frombuffer(buffer, np.uint16).reshape(host.shape))


def on_cpu(weight: Array, dtype: np.dtype) -> Array:
    """A weight as the CPU's products want it: the bits of the model's 16-bit type, float32 for a leaf of any other type."""
    return as_bits(weight) if weight.dtype == dtype else weight.astype(np.float32)


def widen(weight: Array, stored: np.dtype, to: np.dtype) -> Array:
    """Weights as type `to`; `uint16` holds the bits of type `stored`."""
    if weight.dtype != jnp.uint16:
        return weight.astype(to)
    if stored == jnp.bfloat16 and to == jnp.float32:
        return lax.bitcast_convert_type(weight.astype(jnp.uint32) << 16, jnp.float32)
    return lax.bitcast_convert_type(weight, stored).astype(to)


def stacked_matmul(
    x: Float[Array, "tokens in"],
    weight: Array,
    layer: Int[Array, ""] | int,
    *,
    stored: np.dtype,
    tiled: bool,
) -> Float[Array, "tokens out"]:
    """`x @ weight[layer].T`, accumulated in float32 and returned in float32.

    `weight` is `[layers, out, in]` of type `stored` or its bits; `tiled` reads it tile by tile (faster on a CPU, where it
    matters; a GPU's library reads the layer in place).
    """
    layers, out, width = weight.shape
    tile = max(8, TILE_BYTES // (4 * width) // 8 * 8)
    copies = layers > 1 or weight.dtype != x.dtype
    if not tiled or tile >= out or not copies:
        return _matmul(x, widen(_rows(weight, layer, 0, out), stored, x.dtype))

    def body(carry: None, start: Array) -> tuple[None, Array]:
        return carry, _matmul(x, widen(_rows(weight, layer, start, tile), stored, x.dtype))

    whole = out // tile
    _, y = lax.scan(body, None, jnp.arange(whole, dtype=jnp.int32) * tile)  # [whole, tokens, tile]
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], whole * tile)
    if rest := out - whole * tile:
        y = jnp.concatenate(
            [y, _matmul(x, widen(_rows(weight, layer, whole * tile, rest), stored, x.dtype))],
            axis=1,
        )
    return y


def _rows(
    weight: Array, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, count: int
) -> Array:
    if isinstance(layer, int) and weight.shape[0] == 1 and count == weight.shape[1]:
        return weight[0]
    index = (jnp.int32(layer), jnp.int32(start), jnp.int32(0))
    return lax.dynamic_slice(weight, index, (1, count, weight.shape[2]))[0]


def _matmul(x: Float[Array, "tokens in"], w: Float[Array, "out in"]) -> Float[Array, "tokens out"]:
    """`x @ w.T`: float32 operands in full float32 (an accelerator's default would round them to 19 bits)."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
