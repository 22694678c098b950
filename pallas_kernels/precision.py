"""How far a kernel's output may be from the reference: each rounding of `attend.py` followed through the softmax.

`U` is half a unit in the last place of float32 at 1. Roundings of operands are relative and, where the type runs out of
exponents, absolute; `Operands` has both. First come the errors of scores, then what they and the kernel's own roundings make
of a weight, then those of the weighted sum. Nothing is linearized but products of two roundings, which are dropped.
"""

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.elements import BFLOAT16, FLOAT16, FLOAT32, multiplied_in
from pallas_kernels.reference import Row, attention, scores, softmax

U = 2.0**-24
HALF_LEAST = 2.0**-25  # half of the least float16
TINY = 2.0**-126  # below it float32 is flushed to zero
MOST = 300.0  # errors of exponents beyond it are as good as infinite


class Operands(NamedTuple):
    """What is lost when a float32 becomes an operand of a product."""

    relative: float  # of each operand, or of the product of both
    query: float  # absolute, of a query whose largest channel is 1
    weight: float  # absolute, of the weights beside a largest of 1


OPERANDS = {
    FLOAT16: Operands(
        2.0**-11, HALF_LEAST, HALF_LEAST * 2.0**-10
    ),  # weights are kept larger by 2**10
    BFLOAT16: Operands(2.0**-8, 0.0, TINY),
    FLOAT32: Operands(2.0**-22, 0.0, TINY),  # three TF32 parts; less when interpreted
}
OUTPUT = {FLOAT32: (U, TINY), BFLOAT16: (2.0**-8, TINY), FLOAT16: (2.0**-11, HALF_LEAST)}


def bound(
    row: Row,
    *,
    element: Any,
    q_dtype: Any,
    scale_tiles: bool = False,
    sm_scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """`[head_dim]`: the most by which the kernel's output of this row differs from `attention(row)`.

    `scale_tiles`: dynamic scales multiply tiles of keys and values in float16 (prefill of 16-bit queries).
    """
    q_dtype = np.dtype(q_dtype)
    compute = multiplied_in(np.dtype(element), q_dtype)
    operand, keys = OPERANDS[compute], len(row.k)
    k_lost = v_lost = np.zeros((1, 1))
    if scale_tiles and compute == FLOAT16:
        k_lost = _lost_in_tiles(row.k, row.k_dynamic, row.k_largest)
        v_lost = _lost_in_tiles(row.v, row.v_dynamic, row.v_largest)
    score = scores(row.q, row.k, sm_scale=sm_scale, softcap=softcap, offset=row.offset)
    # A score's exponent is it less the running maximum, and the maximum itself moves on: three differences of numbers up to
    # `reach`, and a fourth between parts of a split. 16 covers the 2**10 that float16 weights are kept larger by.
    reach = 16 + np.abs(np.concatenate([score, row.sinks])).max()
    # exp2 errs by 2**-22, for each weight, at each move of the maximum and between parts; each time a sum is multiplied too.
    running = 8 * U * reach + (6 * keys + 16) * U
    error = running + _error_of_scores(row, operand, k_lost, sm_scale=sm_scale, softcap=softcap)

    part, sink = softmax(score, row.sinks)
    grown = np.exp(np.minimum(error, MOST))
    all_grown = part @ grown + sink * np.exp(
        np.minimum(running, MOST)
    )  # nor does their sum shrink by more
    moved = part * (grown * all_grown - 1)

    magnitude = np.abs(row.v)
    rounded = (operand.relative + (3 * keys + 8) * U) * part  # as operands, and in the running sum
    lost = (
        operand.weight * max(part.max(), sink) * row.v_largest / row.v_dynamic
    )  # what a float16 weight cannot say
    total = (moved + rounded + lost) @ magnitude + (part[:, None] * v_lost).sum(0)
    # Whatever the weights are, the output is a mean of the values, and of zero for the sink.
    total = np.minimum(total, 2 * magnitude.max(0)) * np.abs(row.v_scale)

    relative, least = OUTPUT[q_dtype]
    out = np.abs(attention(row, sm_scale=sm_scale, softcap=softcap))
    return total + relative * (out + total) + least


def _error_of_scores(
    row: Row,
    operand: Operands,
    k_lost: np.ndarray,
    *,
    sm_scale: float | None,
    softcap: float | None,
) -> np.ndarray:
    """`[keys]`: absolute errors before any weight is made."""
    sm_scale = len(row.q) ** -0.5 if sm_scale is None else sm_scale
    q, k = np.abs(row.q), np.abs(row.k)
    # The query is an operand, and so is a key where that is float32; one rounding for each channel summed, and one each for
    # K's scale, its product, the factor, its product, the offset and the sum with it.
    error = (operand.relative + (len(q) + 6) * U) * (k @ q * sm_scale + abs(row.offset))
    error += sm_scale * (operand.query * q.max() * k.sum(1) + (k_lost * q).sum(1))
    # tanh passes errors on at most as they are, and adds its own: 1 - 2 / (1 + exp2(cx)), where exp2 errs by 2**-22 and the
    # slope of 2 / (1 + y) is half at most, and the rounding of cx counts less than twice; then three quick operations.
    return error if softcap is None else error + 10 * U * softcap


def _lost_in_tiles(x: np.ndarray, dynamic: np.ndarray, largest: float) -> np.ndarray:
    """`[keys, head_dim]`: what keys or values lose where they are multiplied by their scales relative to the largest of a tile,
    or so far: what a float16 cannot say, and all where the relative scale is none."""
    return np.where(dynamic[:, None] < largest * 2.0**-24, np.abs(x), HALF_LEAST * largest)
