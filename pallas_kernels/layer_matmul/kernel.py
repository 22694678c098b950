"""Matmul of few rows with one layer's matrix, for decode, where reading the matrix takes the time.

A program computes a tile of output channels for all rows (or as many as fit) from one split of the
input channels. The matrix is the left operand: its tiles go from memory through shared memory to
tensor cores once, and rows are padded only to 16. Several splits return one sum each. XLA adds them
and fuses the addition with the next operation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import NotSupported, Refs, cdiv, dot, launch, load, program, store
from pallas_kernels.fp8 import BFLOAT16, FLOAT16, FLOAT32
from pallas_kernels.layer_matmul.blocks import SPLIT_UNIT, MatmulBlocks, choose_blocks

DTYPES = (BFLOAT16, FLOAT16, FLOAT32)


def layer_matmul(
    x: Float[Array, "rows in"],
    weights: Array,
    layer: Int[Array, ""] | int,
    *,
    blocks: MatmulBlocks | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Return `x @ weights[layer].T`, accumulated and returned in float32.

    Args:
      x: rows in bfloat16, float16 or float32.
      weights: `[layers, out, in]`, converted to the dtype of `x`. Only the layer's matrix is read.
      layer: layer index, may be traced.
      blocks: block sizes; chosen by `choose_blocks` if None.
      interpret: run in interpret mode.

    Raises `NotSupported` for other dtypes, `ValueError` for inconsistent shapes.
    """
    rows, width = x.shape
    _, out, weights_width = weights.shape
    if weights_width != width:
        raise ValueError(
            f"x of {x.shape} and weights of {weights.shape}: both must end with the same axis."
        )
    for name, array in (("x", x), ("weights", weights)):
        if np.dtype(array.dtype) not in DTYPES:
            supported = ", ".join(dtype.name for dtype in DTYPES)
            raise NotSupported(f"{name} of {array.dtype}: the matmul supports {supported}.")
    if rows == 0 or out == 0:
        return jnp.zeros((rows, out), jnp.float32)
    if blocks is None:
        blocks = choose_blocks(
            rows=rows,
            out=out,
            width=width,
            multiplied=np.dtype(x.dtype),
            stored=np.dtype(weights.dtype),
        )
    sums = launch(
        functools.partial(_kernel, blocks=blocks, interpret=interpret),
        {"x": x, "weights": weights, "layer": jnp.asarray(layer, jnp.int32).reshape(1)},
        name="layer_matmul",
        grid=(cdiv(rows, blocks.block_rows), cdiv(out, blocks.block_out), blocks.splits),
        out={"out": jax.ShapeDtypeStruct((blocks.splits, rows, out), jnp.float32)},
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
    )["out"]
    return functools.reduce(jnp.add, [sums[i] for i in range(blocks.splits)])


def _kernel(refs: Refs, out_refs: Refs, *, blocks: MatmulBlocks, interpret: bool) -> None:
    x_ref, weights = refs["x"], refs["weights"]
    rows, width = x_ref.shape
    out = weights.shape[1]
    layer = refs["layer"][0]
    split = program(2)
    row, row_valid = _tile_index(program(0), blocks.block_rows, rows)
    out_channel, out_valid = _tile_index(program(1), blocks.block_out, out)
    split_width = cdiv(cdiv(width, SPLIT_UNIT), blocks.splits) * SPLIT_UNIT
    start = split * split_width
    end = jnp.minimum(start + split_width, width)
    once = rows <= blocks.block_rows
    # Whether a tile may extend past the end of its split.
    ragged = width % blocks.block_in or split_width % blocks.block_in

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        channel = start + i * blocks.block_in + jnp.arange(blocks.block_in, dtype=jnp.int32)
        valid = channel < end if ragged else None
        w = load(
            weights,
            layer,
            out_channel[:, None],
            channel[None, :],
            mask=_outer_mask(out_valid, valid),
            other=0,
            once=once,
        )
        x = load(x_ref, row[:, None], channel[None, :], mask=_outer_mask(row_valid, valid), other=0)
        return total + dot(w.astype(x.dtype), x.T, interpret=interpret)

    zeros = jnp.zeros((blocks.block_out, blocks.block_rows), jnp.float32)
    total = lax.fori_loop(0, jnp.maximum(cdiv(end - start, blocks.block_in), 0), body, zeros)
    store(
        out_refs["out"],
        split,
        row[None, :],
        out_channel[:, None],
        value=total,
        mask=_outer_mask(out_valid, row_valid),
    )


def _tile_index(number: jax.Array, size: int, total: int) -> tuple[jax.Array, jax.Array | None]:
    """Return the indices of a tile, and which of them exist; None if all do."""
    index = number * size + jnp.arange(size, dtype=jnp.int32)
    return index, None if total % size == 0 else index < total


def _outer_mask(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """Return the mask `[rows, columns]`; None masks nothing."""
    if rows is None and columns is None:
        return None
    row_mask: Any = True if rows is None else rows[:, None]
    column_mask: Any = True if columns is None else columns[None, :]
    return row_mask & column_mask
