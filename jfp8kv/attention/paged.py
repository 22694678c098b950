"""`attend` over the paged cache: what the engine hands to a model.

Write first, then read: a token's own key and value are what the cache stores, so chunked or whole prefill, a prefix taken over
from another request, or a restart all see the same numbers. An implementation is shown a pool of one format: where layers
differ, each kind of layer has a branch of its own, which only reads the pool.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from jfp8kv.attention.contract import AttentionOptions, KVPages, Layer, LayerScales, Query, Where
from jfp8kv.attention.dispatch import Attention, Write
from jfp8kv.cache.pages import by_kind, write

KV = Float[Array, "tokens kv_heads head_dim"]
Attend = Callable[[Layer, Query, KV, KV, KVPages], tuple[Query, KVPages]]


def paged(
    attention: Attention,
    scales: LayerScales | None,
    options: AttentionOptions,
    where: Callable[[Layer], Where],
    *,
    write: Write = write,
) -> Attend:
    """`attend(layer, q, k, v, pages) -> (out, pages)` for the request that is, in each layer, at `where(layer)`."""

    def attend(layer: Layer, q: Query, k: KV, v: KV, pages: KVPages) -> tuple[Query, KVPages]:
        at = where(layer)
        pages = write(pages, scales, k, v, layer=layer, page_table=at.page_table, start=at.start, length=at.length)
        out = by_kind(layer, pages.layout, lambda kind: attention(q, pages.only(kind), scales, options, at, layer=layer))
        return out, pages

    return attend
