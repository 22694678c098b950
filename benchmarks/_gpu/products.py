"""Products with one layer's matrix as cases to compile: matrices of models by numbers of rows, in every type."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.bound import streaming
from benchmarks._gpu.compiled import Case
from benchmarks._gpu.topology import Target
from pallas_kernels import layer_matmul
from pallas_kernels.layer_matmul.blocks import blocks_for

TYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


def products(target: Target, shapes: dict[str, Any]) -> list[Case]:
    """One matrix by every number of rows, and in every type; others by one number of rows."""
    first, *others = shapes["matrices"]
    asked = [("bf16", rows, first) for rows in shapes["rows"]]
    asked += [
        ("f16", shapes["usual"], first),
        ("f32", shapes["usual"], first),
        ("f32", shapes["rows"][-1], first),
    ]
    asked += [("bf16", shapes["usual"], matrix) for matrix in others]
    return [
        product(target, name, rows, matrix, shapes["matrices"][matrix])
        for name, rows, matrix in asked
    ]


def product(target: Target, name: str, rows: int, matrix: str, shape: tuple[int, int, int]) -> Case:
    """`layer_matmul` of rows and weights of one type; the bound counts what it copies of the matrix, once."""
    dtype = np.dtype(TYPES[name])
    blocks = blocks_for(rows=rows, out=shape[1], width=shape[2], multiplied=dtype, stored=dtype)
    passes = -(-rows // blocks.block_rows)
    used = blocks.block_out / (blocks.block_out + blocks.block_rows) / passes
    return Case(
        f"product, {name}, {rows} by {matrix}",
        "layer_matmul",
        functools.partial(layer_matmul, blocks=blocks),
        {"weights": jax.ShapeDtypeStruct(tuple(shape), dtype)},
        {
            "x": jax.ShapeDtypeStruct((rows, shape[2]), dtype),
            "layer": jax.ShapeDtypeStruct((), jnp.int32),
        },
        target,
        against=functools.partial(streaming, used=used),
    )
