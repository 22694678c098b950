"""The `layer_matmul` calls that are compiled: matrices of models, numbers of rows and dtypes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.bound import streaming_bound
from benchmarks._gpu.compiled import Case
from benchmarks._gpu.topology import Target
from pallas_kernels import layer_matmul
from pallas_kernels.layer_matmul.blocks import choose_blocks

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


def matmul_cases(target: Target, shapes: dict[str, Any]) -> list[Case]:
    """Return the first matrix with every number of rows and dtype, and the others in bfloat16."""
    first, *others = shapes["matrices"]
    usual = shapes["usual"]
    chosen = [("bf16", rows, first) for rows in shapes["rows"]]
    chosen += [("f16", usual, first), ("f32", usual, first), ("f32", shapes["rows"][-1], first)]
    chosen += [("bf16", usual, matrix) for matrix in others]
    return [
        matmul_case(target, dtype, rows, matrix, shapes["matrices"][matrix])
        for dtype, rows, matrix in chosen
    ]


def matmul_case(
    target: Target, dtype_name: str, rows: int, matrix: str, shape: tuple[int, int, int]
) -> Case:
    """Return a case of `layer_matmul`. Its bound counts the bytes of the matrix once."""
    dtype = np.dtype(DTYPES[dtype_name])
    _, out, width = shape
    blocks = choose_blocks(rows=rows, out=out, width=width, multiplied=dtype, stored=dtype)
    passes = -(-rows // blocks.block_rows)
    used = blocks.block_out / (blocks.block_out + blocks.block_rows) / passes
    return Case(
        f"matmul, {dtype_name}, {rows} by {matrix}",
        "layer_matmul",
        functools.partial(layer_matmul, blocks=blocks),
        {"weights": jax.ShapeDtypeStruct(tuple(shape), dtype)},
        {
            "x": jax.ShapeDtypeStruct((rows, width), dtype),
            "layer": jax.ShapeDtypeStruct((), jnp.int32),
        },
        target,
        bound=functools.partial(streaming_bound, used=used),
    )
