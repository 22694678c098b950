"""Few rows times one layer's matrix: made for decode, where reading the matrix once is all that takes time.

A program has a tile of outputs, all rows (or as many as fit) and a share of the channels. The matrix is the left operand: its
tiles go from memory to tensor cores through shared memory once, and rows, few as they are, are padded to 16 and no more.
Several shares leave a sum each, and the caller's program adds them: a fusion with whatever it does to the product next.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import cdiv, dot, launch, load, program, store
from pallas_kernels.elements import BFLOAT16, FLOAT16, FLOAT32
from pallas_kernels.errors import NotSupported
from pallas_kernels.layer_matmul.blocks import UNIT, MatmulBlocks, blocks_for

TYPES = (BFLOAT16, FLOAT16, FLOAT32)
Refs = dict[str, Any]


def layer_matmul(
    x: Float[Array, "rows in"],
    weights: Array,
    layer: Int[Array, ""] | int,
    *,
    blocks: MatmulBlocks | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """`x @ weights[layer].T` of weights `[layers, out, in]`, summed and returned in float32.

    Weights of another type than `x` are converted to it first. No more is read of `weights` than the layer's matrix, in place.
    """
    (rows, width), (_, out, of) = x.shape, weights.shape
    if of != width:
        raise ValueError(
            f"x of {x.shape} and weights of {weights.shape}: both must end with the same axis."
        )
    for name, given in (("x", x), ("weights", weights)):
        if np.dtype(given.dtype) not in TYPES:
            raise NotSupported(
                f"{name} of {given.dtype}: the product knows {', '.join(t.name for t in TYPES)}."
            )
    if rows == 0 or out == 0:
        return jnp.zeros((rows, out), jnp.float32)
    if blocks is None:
        blocks = blocks_for(
            rows=rows,
            out=out,
            width=width,
            multiplied=np.dtype(x.dtype),
            stored=np.dtype(weights.dtype),
        )
    parts = launch(
        functools.partial(_kernel, blocks=blocks, interpret=interpret),
        {"x": x, "weights": weights, "layer": jnp.asarray(layer, jnp.int32).reshape(1)},
        name="layer_matmul",
        grid=(cdiv(rows, blocks.block_rows), cdiv(out, blocks.block_out), blocks.splits),
        out={"out": jax.ShapeDtypeStruct((blocks.splits, rows, out), jnp.float32)},
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
    )["out"]
    return functools.reduce(jnp.add, [parts[i] for i in range(blocks.splits)])


def _kernel(refs: Refs, out_refs: Refs, *, blocks: MatmulBlocks, interpret: bool) -> None:
    x_ref, weights = refs["x"], refs["weights"]
    (rows, width), out, layer = x_ref.shape, weights.shape[1], refs["layer"][0]
    split = program(2)
    row, row_known = _tile(program(0), blocks.block_rows, rows)
    at, at_known = _tile(program(1), blocks.block_out, out)
    share = cdiv(cdiv(width, UNIT), blocks.splits) * UNIT
    start = split * share
    end = jnp.minimum(start + share, width)
    once = rows <= blocks.block_rows
    ragged = (
        width % blocks.block_in or share % blocks.block_in
    )  # whether a tile may go past its share

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        channel = start + i * blocks.block_in + jnp.arange(blocks.block_in, dtype=jnp.int32)
        known = channel < end if ragged else None
        w = load(
            weights,
            layer,
            at[:, None],
            channel[None, :],
            mask=_both(at_known, known),
            other=0,
            once=once,
        )
        x = load(x_ref, row[:, None], channel[None, :], mask=_both(row_known, known), other=0)
        return total + dot(w.astype(x.dtype), x.T, interpret=interpret)

    zeros = jnp.zeros((blocks.block_out, blocks.block_rows), jnp.float32)
    total = lax.fori_loop(0, jnp.maximum(cdiv(end - start, blocks.block_in), 0), body, zeros)
    store(
        out_refs["out"],
        split,
        row[None, :],
        at[:, None],
        value=total,
        mask=_both(at_known, row_known),
    )


def _tile(number: jax.Array, size: int, of: int) -> tuple[jax.Array, jax.Array | None]:
    """Indices of a tile, and which of them exist; None: all."""
    index = number * size + jnp.arange(size, dtype=jnp.int32)
    return index, None if of % size == 0 else index < of


def _both(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
    """`[first, second]`: where both hold; None is no mask."""
    if first is None and second is None:
        return None
    return (True if first is None else first[:, None]) & (
        True if second is None else second[None, :]
    )
