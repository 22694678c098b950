"""What every implementation of paged attention is given, and what it must return.

All are functions of one request, batched with `vmap` (the pool unbatched). They are shown a pool whose layers are of one kind
(`KVPool.only`), whose elements may lie in byte planes (`KVPool.stored`) and whose keys may be transposed
(`PoolLayout.keys_transposed`). They read the same stored bytes and agree within rounding, or raise `NotSupported`.
"""

from jaxtyping import Array, Float, Int

from jfp8kv.cache.pool import KVPool, Layer, LayerScales
from jfp8kv.core.pytree import pytree, static


@pytree
class AttentionMetadata:
    """Where one request's tokens are: its `page_table`, and which of its tokens the queries are.

    Queries stand at positions `start, start + 1, ...`; the cache holds positions `0 .. length - 1`, those of the queries
    included. Queries at `length` or beyond are padding. `page_table` has the page numbers of the layer's group; entries past
    the request's pages, or of pages before every query's window, are never read for their value. `most_tokens` is an upper
    bound on `length` over all requests of the batch: implementations stop there.
    """

    page_table: Int[Array, " pages"]
    start: Int[Array, ""]
    length: Int[Array, ""]
    most_tokens: Int[Array, ""]


@pytree
class AttentionOptions:
    """What models vary: the factor on scores, windows, a cap on scores, and sinks.

    `window`: per layer, a query at `p` sees keys `p - window + 1 .. p`; 0 sees all. An array, so that layers differ under
    `scan`. `softcap`: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118, section 2).
    `sinks`: one logit per query head that joins the softmax's denominator and no value (gpt-oss; arXiv:2309.17453).
    """

    window: Int[Array, " layers"] | None = None
    sinks: Float[Array, "layers q_heads"] | None = None
    sm_scale: float = static(default=1.0)
    softcap: float | None = static(default=None)


Query = Float[Array, "tokens q_heads head_dim"]

__all__ = ["AttentionOptions", "KVPool", "Layer", "LayerScales", "Query", "AttentionMetadata"]
