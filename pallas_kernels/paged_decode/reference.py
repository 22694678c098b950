"""What `paged_decode` computes, in float64, and how far from it the kernel may be: a prefill of one query per request."""

from typing import Any

import numpy as np

from pallas_kernels.paged_prefill.reference import paged_prefill_reference


def paged_decode_reference(
    q: Any, k_pages: Any, v_pages: Any, page_table: Any, lengths: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Output and error bound, both float64 `[requests, q_heads, head_dim]`, of the arguments of the kernel."""
    queries = np.minimum(np.asarray(lengths), 1)
    return paged_prefill_reference(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        np.arange(len(queries)),
        queries,
        scale_tiles=False,
        **options,
    )
