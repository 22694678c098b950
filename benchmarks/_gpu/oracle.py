"""Attention over pages in float64, one request and one head at a time, and how far a right kernel may be from it.

The bound is by element. A query rounded to `u` moves a score by at most `u * sum |q||k|`, and a softmax weight by at most twice
that share, for its denominator moves too; weights themselves are rounded to `u`; sums of `n` keys are float32; the result
is rounded to the type it is given in.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT32 = 2.0**-24
FUNCTIONS = 2.0**-20  # of exp2, tanh and scales, as a share


@dataclass(frozen=True)
class Wanted:
    """Outputs and how much each may differ."""

    out: np.ndarray
    within: np.ndarray

    def error(self, got: np.ndarray) -> float:
        """The worst error as a share of what is allowed: at most 1 if right; NaN is infinitely wrong."""
        share = np.abs(np.asarray(got, np.float64) - self.out) / self.within
        return float(np.max(np.where(np.isnan(share), np.inf, share), initial=0.0))


@dataclass(frozen=True)
class Rounding:
    """The unit roundoffs of what is multiplied and of the result."""

    product: float
    result: float

    @classmethod
    def of(cls, compute: np.dtype, result: np.dtype) -> "Rounding":
        units = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-21}
        return cls(units[np.dtype(compute).name], {**units, "float32": FLOAT32}[np.dtype(result).name])


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    rounding: Rounding,
    *,
    sm_scale: float,
    window: int = 0,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
    score_offset: np.ndarray | None = None,
) -> Wanted:
    """Queries `[queries, q_heads, channels]` at positions of a text over its keys and values `[keys, kv_heads, channels]`."""
    out, within = np.zeros(q.shape), np.full(q.shape, np.finfo(np.float32).tiny)
    group = q.shape[1] // k.shape[1]
    for row, head in np.ndindex(q.shape[:2]):
        first = max(0, positions[row] - window + 1) if window else 0
        seen = slice(first, positions[row] + 1)
        keys, values, query = k[seen, head // group], v[seen, head // group], q[row, head]
        scores = keys @ query * sm_scale
        slack = (np.abs(keys) @ np.abs(query)).max(initial=0.0) * abs(sm_scale)
        if score_offset is not None:
            scores, slack = scores + score_offset[row, head], slack + abs(score_offset[row, head]) * FLOAT32 / rounding.product
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        logits = scores if sinks is None else np.append(scores, sinks[head])
        if not logits.size:
            continue
        weights = np.exp(logits - logits.max())
        weights = (weights / weights.sum())[: len(scores)]
        size = weights @ np.abs(values)
        out[row, head] = weights @ values
        share = (2 * slack + 2) * rounding.product + FUNCTIONS * (1 + (softcap or 0)) + (len(scores) + 4) * FLOAT32
        within[row, head] += size * share + np.abs(out[row, head]) * rounding.result
    return Wanted(out, within)


def paged(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    page_table: np.ndarray,
    lengths: np.ndarray,
    first_query: np.ndarray,
    queries: np.ndarray,
    rounding: Rounding,
    *,
    sinks: np.ndarray | None = None,
    score_offset: np.ndarray | None = None,
    **options: Any,
) -> Wanted:
    """The last `queries[r]` tokens of every request, over real keys and values `[rows, kv_heads, page_size, channels]`."""
    out, within = np.zeros(q.shape), np.full(q.shape, np.finfo(np.float32).tiny)
    for request, length in enumerate(lengths):
        page = k.shape[2]
        numbers = page_table[request, : -(-length // page)]
        keys, values = (x[numbers].swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])[:length] for x in (k, v))
        rows = slice(first_query[request], first_query[request] + queries[request])
        positions = length - queries[request] + np.arange(queries[request])
        offset = None if score_offset is None else score_offset[rows]
        done = attention(q[rows], keys, values, positions, rounding, sinks=sinks, score_offset=offset, **options)
        out[rows], within[rows] = done.out, done.within
    return Wanted(out, within)
