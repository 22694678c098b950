"""Reference paged attention for one query at a time: scores, softmax, weighted sum.

`scores` and `softmax` take NumPy or JAX arrays. The rest is NumPy in float64: the kernels are tested
against it. Both sides read the same stored bits, so they differ by the rounding of the kernels only.
`precision.py` derives the bound.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One query and head, and what it sees. Static scales are where the kernels have them: K's in the query, V's beside it."""

    place: int  # of the query in `q`
    head: int
    q: np.ndarray  # [head_dim], times the K scales
    k: np.ndarray  # [keys, head_dim]
    v: np.ndarray  # [keys, head_dim]
    v_scale: np.ndarray  # [head_dim]
    k_dynamic: np.ndarray  # [keys]: dynamic scales, in `k` and `v` already; 1 without
    v_dynamic: np.ndarray  # [keys]
    k_largest: float  # of any token that the chunk sees
    v_largest: float
    offset: float  # added to the scores
    sinks: np.ndarray  # [1] or [0]: logits that join the softmax's denominator


def rows(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    first_query: Any,
    queries: Any,
    *,
    element: Any = None,
    layer: int | None = None,
    first_row: Any = 0,
    k_scale: Any = None,
    v_scale: Any = None,
    k_exponent: Any = None,
    v_exponent: Any = None,
    first_exponent_row: Any = None,
    window: Any = None,
    sinks: Any = None,
    score_offset: Any = None,
) -> Iterator[Row]:
    """Every row of every request. Slots that a request's queries do not see are not touched."""
    element = np.dtype(k_pages.dtype if element is None else element)
    if layer is not None:
        by_layer = (first_row, first_exponent_row, k_scale, v_scale, window, sinks)
        here = (None if x is None else np.asarray(x)[layer] for x in by_layer)
        first_row, first_exponent_row, k_scale, v_scale, window, sinks = here
    k_pages, v_pages = (
        np.asarray(pages).view(element).astype(np.float64) for pages in (k_pages, v_pages)
    )
    q, page_table = np.asarray(q).astype(np.float64), np.asarray(page_table)
    (_, kv_heads, page_size, head_dim), q_heads = k_pages.shape, q.shape[1]
    k_scale, v_scale = (
        np.ones((kv_heads, head_dim)) if s is None else _float32(s) for s in (k_scale, v_scale)
    )
    first_exponent_row = first_row if first_exponent_row is None else first_exponent_row

    for request, i in ((request, i) for request, n in enumerate(queries) for i in range(n)):
        length, place = int(lengths[request]), int(first_query[request]) + i
        position = length - int(queries[request]) + i
        chunk, seen = (max(0, p - window + 1) if window else 0 for p in (position - i, position))
        token = np.arange(chunk, length)  # what some query of the chunk sees
        page, slot, sees = (
            page_table[request, token // page_size],
            token % page_size,
            (token >= seen) & (token <= position),
        )
        for head in range(q_heads):
            kv_head = head * kv_heads // q_heads
            k_dynamic, v_dynamic = (
                np.ones(len(token))
                if e is None
                else 2.0 ** (np.float64(e[first_exponent_row + page, kv_head, slot]) - 127)
                for e in (k_exponent, v_exponent)
            )
            yield Row(
                place,
                head,
                q[place, head] * k_scale[kv_head],
                (k_pages[first_row + page, kv_head, slot] * k_dynamic[:, None])[sees],
                (v_pages[first_row + page, kv_head, slot] * v_dynamic[:, None])[sees],
                v_scale[kv_head],
                k_dynamic[sees],
                v_dynamic[sees],
                k_dynamic.max(),
                v_dynamic.max(),
                0.0 if score_offset is None else float(score_offset[place, head]),
                np.zeros(0) if sinks is None else _float32(sinks)[head : head + 1],
            )


def scores(
    q: Any,
    k: Any,
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    offset: Any = 0.0,
) -> Any:
    """Return the scores `[keys]` of one query, in the array library of `q` (NumPy or JAX).

    Args:
      q: `[head_dim]`.
      k: `[keys, head_dim]`.
      sm_scale: the factor on scores; `1 / sqrt(head_dim)` if None.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      offset: added to the scores before the cap.
    """
    sm_scale = len(q) ** -0.5 if sm_scale is None else sm_scale
    plain = k @ q * sm_scale + offset
    return plain if softcap is None else softcap * q.__array_namespace__().tanh(plain / softcap)


def softmax(scores: Any, sinks: Any) -> tuple[Any, Any]:
    """Return the weights `[keys]` of one query, and the weight of its sink.

    Args:
      scores: `[keys]`; -inf for a masked key.
      sinks: `[1]` or `[0]`: logits that join the denominator of the softmax.
    """
    xp = scores.__array_namespace__()
    logits = xp.concat([scores, sinks])
    parts = xp.exp(logits - xp.max(logits))
    parts = parts / xp.sum(parts)
    return parts[: len(scores)], xp.sum(parts[len(scores) :])


def attention(
    row: Row, *, sm_scale: float | None = None, softcap: float | None = None
) -> np.ndarray:
    """`[head_dim]`: `softmax(q k^T) v`."""
    part, _ = softmax(
        scores(row.q, row.k, sm_scale=sm_scale, softcap=softcap, offset=row.offset), row.sinks
    )
    return part @ row.v * row.v_scale


def _float32(x: Any) -> np.ndarray:
    """As the kernels take them."""
    return np.asarray(x).astype(np.float32).astype(np.float64)
