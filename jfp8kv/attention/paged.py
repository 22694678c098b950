"""`attend` over the paged cache: what the engine hands to a model.

Write first, then read: a token's own key and value are what the cache stores, so chunked or whole prefill, a prefix taken over
from another request, or a restart all see the same numbers. An implementation is shown a pool of one format: where layers
differ, each kind of layer has a branch of its own, which only reads the pool.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from jfp8kv.attention.dispatch import Attention, Write
from jfp8kv.attention.interface import (
    AttentionMetadata,
    AttentionOptions,
    KVPool,
    Layer,
    LayerScales,
    Query,
)
from jfp8kv.cache.pool import switch_on_spec, write

KV = Float[Array, "tokens kv_heads head_dim"]
Attend = Callable[[Layer, Query, KV, KV, KVPool], tuple[Query, KVPool]]


def paged(
    attention: Attention,
    scales: LayerScales | None,
    options: AttentionOptions,
    metadata: Callable[[Layer], AttentionMetadata],
    *,
    write: Write = write,
) -> Attend:
    """`attend(layer, q, k, v, pages) -> (out, pages)` for the request that is, in each layer, at `where(layer)`."""

    def attend(layer: Layer, q: Query, k: KV, v: KV, pages: KVPool) -> tuple[Query, KVPool]:
        at = metadata(layer)
        pages = write(
            pages,
            scales,
            k,
            v,
            layer=layer,
            page_table=at.page_table,
            start=at.start,
            length=at.length,
        )
        out = switch_on_spec(
            layer,
            pages.layout,
            lambda kind: attention(q, pages.only(kind), scales, options, at, layer=layer),
        )
        return out, pages

    return attend
