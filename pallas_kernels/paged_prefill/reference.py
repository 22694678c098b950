"""What `paged_prefill` computes, in float64, and how far from it the kernel may be."""

from typing import Any

import numpy as np

from pallas_kernels.precision import bound
from pallas_kernels.reference import attention, rows


def paged_prefill_reference(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    first_query: Any,
    queries: Any,
    *,
    element: Any = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    scale_tiles: bool = True,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and error bound, both float64 `[queries, q_heads, head_dim]`, of the arguments of the kernel."""
    element = np.dtype(k_pages.dtype if element is None else element)
    out, error = np.zeros(q.shape), np.zeros(q.shape)
    for row in rows(
        q, k_pages, v_pages, page_table, lengths, first_query, queries, element=element, **options
    ):
        scores = {"sm_scale": sm_scale, "softcap": softcap}
        out[row.place, row.head] = attention(row, **scores)
        tiles = scale_tiles and options.get("k_exponent") is not None
        error[row.place, row.head] = bound(
            row, element=element, q_dtype=q.dtype, scale_tiles=tiles, **scores
        )
    return out, error
