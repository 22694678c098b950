"""Matmuls with the stacked weights of all layers, read tile by tile on a CPU.

All layers of a decoder share one array per parameter, `[layers, out, in]`, so that `lax.scan` runs
them with one traced body. Indexing that array would first copy the whole matrix of the layer, which
on XLA:CPU takes two to four times as long as a matmul with few rows. So a matrix is read in tiles
of rows that fit the CPU's cache: a tile is copied out of the stack and widened to float32 in one
pass, and the matmul reads it from the cache (docs/notes/003).

On a CPU 16-bit weights are stored as bits (`uint16`, see `as_bits`), for the same reason as the KV
cache: XLA:CPU would widen the whole stack at each slice of it.
"""

import ctypes
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

TILE_BYTES = 1 << 20  # of a widened tile


@runtime_checkable
class Matmul(Protocol):
    """A function with the contract of `stacked_matmul`."""

    def __call__(
        self,
        x: Float[Array, "tokens in"],
        weight: Array,
        layer: Int[Array, ""] | int,
        *,
        weight_dtype: np.dtype[Any],
        tiled: bool,
    ) -> Float[Array, "tokens out"]:
        """Return `x @ weight[layer].T` in float32."""


def as_bits(weight: Array) -> Array:
    """Return a 16-bit float array in host memory as `uint16`, without a copy.

    Arrays of other types are returned unchanged. A bitcast would copy, and NumPy's view of a JAX
    array is read-only, which DLPack cannot express, so the view goes through ctypes. JAX never
    writes to the result, since an array with another owner cannot be donated.
    """
    if weight.dtype.itemsize != 2:
        return weight
    host = np.ascontiguousarray(np.asarray(weight))
    buffer: Any = (ctypes.c_uint16 * host.size).from_address(host.ctypes.data)
    buffer.owner = host  # the view keeps the array alive
    return jnp.from_dlpack(np.frombuffer(buffer, np.uint16).reshape(host.shape))


def cpu_weight(weight: Array, dtype: np.dtype[Any]) -> Array:
    """Return a weight as matmuls on a CPU read it.

    That is the bits of the 16-bit `dtype` of the model, or float32 for a weight of another type.
    """
    return as_bits(weight) if weight.dtype == dtype else weight.astype(np.float32)


def backend_weights(tree: Any, dtype: np.dtype[Any]) -> Any:
    """Return the weights of a model as matmuls on this backend read them, see `cpu_weight`."""
    if jax.default_backend() != "cpu":
        return tree
    return jax.tree.map(lambda weight: cpu_weight(weight, dtype), tree)


def widen(weight: Array, weight_dtype: np.dtype[Any], to: np.dtype[Any]) -> Array:
    """Return weights as type `to`; `uint16` arrays are the bits of `weight_dtype`."""
    if weight.dtype != jnp.uint16:
        return weight.astype(to)
    if weight_dtype == jnp.bfloat16 and to == jnp.float32:
        return lax.bitcast_convert_type(weight.astype(jnp.uint32) << 16, jnp.float32)
    return lax.bitcast_convert_type(weight, weight_dtype).astype(to)


def stacked_matmul(
    x: Float[Array, "tokens in"],
    weight: Array,
    layer: Int[Array, ""] | int,
    *,
    weight_dtype: np.dtype[Any],
    tiled: bool,
) -> Float[Array, "tokens out"]:
    """Return `x @ weight[layer].T`, accumulated in float32, as float32.

    Args:
      x: rows to multiply.
      weight: `[layers, out, in]`, of type `weight_dtype` or its bits.
      layer: may be traced.
      weight_dtype: the type of the weights.
      tiled: read the matrix tile by tile, which is faster on a CPU. The matmul library of a GPU
        reads the layer in place.
    """
    layers, out, width = weight.shape
    tile = max(8, TILE_BYTES // (4 * width) // 8 * 8)
    copies = layers > 1 or weight.dtype != x.dtype

    def rows_matmul(start: Int[Array, ""] | int, count: int) -> Array:
        rows = _rows(weight, layer, start, count)
        return _matmul(x, widen(rows, weight_dtype, x.dtype))

    if not tiled or tile >= out or not copies:
        return rows_matmul(0, out)

    def body(carry: None, start: Array) -> tuple[None, Array]:
        return carry, rows_matmul(start, tile)

    whole = out // tile
    _, y = lax.scan(body, None, jnp.arange(whole, dtype=jnp.int32) * tile)  # [whole, tokens, tile]
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], whole * tile)
    rest = out - whole * tile
    if rest:
        y = jnp.concatenate([y, rows_matmul(whole * tile, rest)], axis=1)
    return y


def _rows(
    weight: Array, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, count: int
) -> Array:
    """Return rows `start .. start + count - 1` of the matrix of a layer."""
    if isinstance(layer, int) and weight.shape[0] == 1 and count == weight.shape[1]:
        return weight[0]
    index = (jnp.int32(layer), jnp.int32(start), jnp.int32(0))
    return lax.dynamic_slice(weight, index, (1, count, weight.shape[2]))[0]


def _matmul(x: Float[Array, "tokens in"], w: Float[Array, "out in"]) -> Float[Array, "tokens out"]:
    """Return `x @ w.T` as float32.

    Float32 operands are multiplied in full precision: accelerators round to 19 bits by default.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
