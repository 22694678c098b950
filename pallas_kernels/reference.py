"""Reference paged attention for one query at a time: scores, softmax, weighted sum.

`scores` and `softmax` take NumPy or JAX arrays. The rest is NumPy in float64: the kernels are
tested against it. Both sides read the same stored bits, so they differ by the rounding of the
kernels only. `error_bound.py` derives the bound.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.kernel_inputs import LayerView

# Softmax constants. exp(MASKED - LOWEST) is 0, so the weights of a row without keys sum to 0.
MASKED = -1e30  # score of a masked key
LOWEST = -1e20  # initial running maximum


class QueryRow(NamedTuple):
    """One query head of one token, with the keys and values that it attends to.

    Static scales are applied where the kernels apply them: K scales to the query, V scales to the
    output.
    """

    query: int  # index in `q`
    head: int
    q: np.ndarray  # [head_dim], times the K scales
    k: np.ndarray  # [keys, head_dim], times the dynamic scales
    v: np.ndarray  # [keys, head_dim], times the dynamic scales
    v_scale: np.ndarray  # [head_dim]
    k_dynamic: np.ndarray  # [keys]: dynamic scales; 1 if scales are static
    v_dynamic: np.ndarray  # [keys]
    k_max_scale: float  # largest dynamic scale of the tokens that the chunk attends to
    v_max_scale: float
    score_offset: float  # added to the scores
    sinks: np.ndarray  # [1] or [0]: logits added to the softmax denominator


def query_rows(
    q: Any,
    kv: LayerView,
    page_table: Any,
    lengths: Any,
    first_query: Any,
    queries: Any,
    *,
    element: Any = None,
    score_offset: Any = None,
) -> Iterator[QueryRow]:
    """Yield every query head of every query of every request.

    Takes the arguments of `paged_prefill`. Slots outside the window of all queries are not read.
    """
    element = np.dtype(kv.k_pages.dtype if element is None else element)
    layer = _select_layer(kv)
    k_pages = np.asarray(kv.k_pages).view(element).astype(np.float64)
    v_pages = np.asarray(kv.v_pages).view(element).astype(np.float64)
    q = np.asarray(q).astype(np.float64)
    page_table = np.asarray(page_table)
    _, kv_heads, page_size, head_dim = k_pages.shape
    q_heads = q.shape[1]
    ones = np.ones((kv_heads, head_dim))
    k_scale = ones if layer.k_scale is None else _as_float32(layer.k_scale)
    v_scale = ones if layer.v_scale is None else _as_float32(layer.v_scale)
    first_row = layer.first_row
    first_exponent_row = layer.first_exponent_row
    if first_exponent_row is None:
        first_exponent_row = first_row
    window = 0 if layer.window is None else int(layer.window)

    def dynamic_scales(exponents: Any, page: Any, head: int, slot: Any) -> np.ndarray:
        if exponents is None:
            return np.ones(len(slot))
        codes = np.int32(exponents[first_exponent_row + page, head, slot])
        return np.ldexp(np.ones(len(slot)), codes - 127)

    for request, i in ((request, i) for request, n in enumerate(queries) for i in range(n)):
        length = int(lengths[request])
        index = int(first_query[request]) + i
        position = length - int(queries[request]) + i
        chunk_start = max(0, position - i - window + 1) if window else 0
        window_start = max(0, position - window + 1) if window else 0
        token = np.arange(chunk_start, length)  # visible to any query of the chunk
        page = page_table[request, token // page_size]
        slot = token % page_size
        visible = (token >= window_start) & (token <= position)
        for head in range(q_heads):
            kv_head = head * kv_heads // q_heads
            k_dynamic = dynamic_scales(kv.k_exponent, page, kv_head, slot)
            v_dynamic = dynamic_scales(kv.v_exponent, page, kv_head, slot)
            k = k_pages[first_row + page, kv_head, slot] * k_dynamic[:, None]
            v = v_pages[first_row + page, kv_head, slot] * v_dynamic[:, None]
            sinks = np.zeros(0)
            if layer.sinks is not None:
                sinks = _as_float32(layer.sinks)[head : head + 1]
            yield QueryRow(
                index,
                head,
                q[index, head] * k_scale[kv_head],
                k[visible],
                v[visible],
                v_scale[kv_head],
                k_dynamic[visible],
                v_dynamic[visible],
                k_dynamic.max(),
                v_dynamic.max(),
                0.0 if score_offset is None else float(score_offset[index, head]),
                sinks,
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
    row: QueryRow, *, sm_scale: float | None = None, softcap: float | None = None
) -> np.ndarray:
    """Return `softmax(q k^T) v` of one query, `[head_dim]`."""
    row_scores = scores(row.q, row.k, sm_scale=sm_scale, softcap=softcap, offset=row.score_offset)
    weights, _ = softmax(row_scores, row.sinks)
    return weights @ row.v * row.v_scale


def _select_layer(kv: LayerView) -> LayerView:
    """Return the view with the values of its layer where it has those of all layers."""
    if kv.layer is None:
        return kv

    def select(x: Any) -> Any:
        return None if x is None else np.asarray(x)[kv.layer]

    return kv._replace(
        first_row=select(kv.first_row),
        first_exponent_row=select(kv.first_exponent_row),
        k_scale=select(kv.k_scale),
        v_scale=select(kv.v_scale),
        window=select(kv.window),
        sinks=select(kv.sinks),
    )


def _as_float32(x: Any) -> np.ndarray:
    """Return `x` rounded to float32, as the kernels read it, in float64."""
    return np.asarray(x).astype(np.float32).astype(np.float64)
