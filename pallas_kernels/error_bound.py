"""Reference outputs of the attention kernels, with a bound on the error of a kernel.

The bound follows each rounding of `softmax_loop.py` through the softmax. `U` is half a unit in the
last place of float32 at 1. Roundings of operands are relative and, where the type underflows,
absolute: see `OperandError`. First come the errors of scores, then their effect and that of the
kernel's own roundings on a weight, then the error of the weighted sum. Only products of two
roundings are dropped.
"""

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.fp8 import BFLOAT16, FLOAT16, FLOAT32, compute_dtype
from pallas_kernels.kernel_inputs import LayerView
from pallas_kernels.reference import QueryRow, attention, query_rows, scores, softmax

U = 2.0**-24
HALF_LEAST = 2.0**-25  # half of the smallest float16
TINY = 2.0**-126  # smaller float32 numbers are flushed to zero
MAX_EXPONENT = 300.0  # larger errors of exponents are as good as infinite


class OperandError(NamedTuple):
    """Errors of converting a float32 to a matmul operand."""

    relative: float  # of each operand, or of the product of both
    query: float  # absolute, of a query with a largest channel of 1
    weight: float  # absolute, of weights with a largest of 1


OPERAND_ERRORS = {
    # Weights are multiplied by 2**10 (`KernelConfig.weight_shift`).
    FLOAT16: OperandError(2.0**-11, HALF_LEAST, HALF_LEAST * 2.0**-10),
    BFLOAT16: OperandError(2.0**-8, 0.0, TINY),
    FLOAT32: OperandError(2.0**-22, 0.0, TINY),  # three TF32 parts; less when interpreted
}
OUTPUT_ERRORS = {FLOAT32: (U, TINY), BFLOAT16: (2.0**-8, TINY), FLOAT16: (2.0**-11, HALF_LEAST)}


def paged_decode_reference(
    q: Any,
    kv: LayerView,
    page_table: Any,
    lengths: Any,
    *,
    element: Any = None,
    score_offset: Any = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return output and error bound of `paged_decode`, float64 `[requests, q_heads, head_dim]`."""
    queries = np.minimum(np.asarray(lengths), 1)
    return paged_prefill_reference(
        q,
        kv,
        page_table,
        lengths,
        np.arange(len(queries)),
        queries,
        element=element,
        score_offset=score_offset,
        sm_scale=sm_scale,
        softcap=softcap,
        scale_tiles=False,
    )


def paged_prefill_reference(
    q: Any,
    kv: LayerView,
    page_table: Any,
    lengths: Any,
    first_query: Any,
    queries: Any,
    *,
    element: Any = None,
    score_offset: Any = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    scale_tiles: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return output and error bound of `paged_prefill`, float64 `[queries, q_heads, head_dim]`.

    `scale_tiles`: whether dynamic scales multiply float16 tiles of keys and values.
    """
    element = np.dtype(kv.k_pages.dtype if element is None else element)
    out = np.zeros(q.shape)
    error = np.zeros(q.shape)
    scale_tiles = scale_tiles and kv.k_exponent is not None
    rows = query_rows(
        q, kv, page_table, lengths, first_query, queries, element=element, score_offset=score_offset
    )
    for row in rows:
        place = (row.query, row.head)
        out[place] = attention(row, sm_scale=sm_scale, softcap=softcap)
        error[place] = error_bound(
            row,
            element=element,
            q_dtype=q.dtype,
            scale_tiles=scale_tiles,
            sm_scale=sm_scale,
            softcap=softcap,
        )
    return out, error


def error_bound(
    row: QueryRow,
    *,
    element: Any,
    q_dtype: Any,
    scale_tiles: bool = False,
    sm_scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Return the largest possible error of a kernel's output against `attention(row)`.

    Float64 `[head_dim]`. `scale_tiles`: whether dynamic scales multiply float16 tiles of keys and
    values (prefill of 16-bit queries).
    """
    q_dtype = np.dtype(q_dtype)
    compute = compute_dtype(np.dtype(element), q_dtype)
    operand = OPERAND_ERRORS[compute]
    keys = len(row.k)
    k_error = v_error = np.zeros((1, 1))
    if scale_tiles and compute == FLOAT16:
        k_error = _tile_error(row.k, row.k_dynamic, row.k_max_scale)
        v_error = _tile_error(row.v, row.v_dynamic, row.v_max_scale)
    score = scores(row.q, row.k, sm_scale=sm_scale, softcap=softcap, offset=row.score_offset)
    # The exponent of a weight is its score minus the running maximum, and the maximum itself
    # changes: three differences of numbers up to `reach`, and a fourth between splits. 16 covers
    # the weight shift of 2**10.
    reach = 16 + np.abs(np.concatenate([score, row.sinks])).max()
    # exp2 has an error of 2**-22 for each weight, each change of the maximum and between splits;
    # each change also multiplies a sum.
    running = 8 * U * reach + (6 * keys + 16) * U
    error = running + _score_error(row, operand, k_error, sm_scale=sm_scale, softcap=softcap)

    weight, sink = softmax(score, row.sinks)
    growth = np.exp(np.minimum(error, MAX_EXPONENT))
    # The sum of the weights grows by at most this factor, and shrinks by no more.
    sum_growth = weight @ growth + sink * np.exp(np.minimum(running, MAX_EXPONENT))
    weight_error = weight * (growth * sum_growth - 1)

    magnitude = np.abs(row.v)
    # Rounding as operands, and in the running sum.
    rounded = (operand.relative + (3 * keys + 8) * U) * weight
    # Underflow of a float16 weight.
    underflow = operand.weight * max(weight.max(), sink) * row.v_max_scale / row.v_dynamic
    total = (weight_error + rounded + underflow) @ magnitude
    total = total + (weight[:, None] * v_error).sum(0)
    # For any weights, the output is a mean of the values and of zero for the sink.
    total = np.minimum(total, 2 * magnitude.max(0)) * np.abs(row.v_scale)

    relative, least = OUTPUT_ERRORS[q_dtype]
    out = np.abs(attention(row, sm_scale=sm_scale, softcap=softcap))
    return total + relative * (out + total) + least


def _score_error(
    row: QueryRow,
    operand: OperandError,
    k_error: np.ndarray,
    *,
    sm_scale: float | None,
    softcap: float | None,
) -> np.ndarray:
    """Return the absolute errors of the scores, `[keys]`."""
    sm_scale = len(row.q) ** -0.5 if sm_scale is None else sm_scale
    q, k = np.abs(row.q), np.abs(row.k)
    # The query is an operand, and so is a float32 key. One rounding per summed channel, and one
    # each for the K scale, its product, the softmax scale, its product, the offset and its sum.
    error = (operand.relative + (len(q) + 6) * U) * (k @ q * sm_scale + abs(row.score_offset))
    error += sm_scale * (operand.query * q.max() * k.sum(1) + (k_error * q).sum(1))
    # tanh does not increase errors, and has its own: 1 - 2 / (1 + exp2(cx)), where exp2 has an
    # error of 2**-22, the slope of 2 / (1 + y) is at most a half, and the rounding of cx counts
    # less than twice; then three fast operations.
    return error if softcap is None else error + 10 * U * softcap


def _tile_error(x: np.ndarray, dynamic: np.ndarray, largest: float) -> np.ndarray:
    """Return the errors of multiplying keys or values by their relative scales in float16.

    `[keys, head_dim]`. Scales are relative to the largest of a tile or so far. A product loses at
    most half of the smallest float16, and everything if the relative scale underflows.
    """
    return np.where(dynamic[:, None] < largest * 2.0**-24, np.abs(x), HALF_LEAST * largest)
