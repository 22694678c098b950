"""Reference attention: gather and decode every key, softmax, weighted sum.

The other backends are tested against it. It needs memory for the whole context in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jfp8kv.attention.interface import (
    AttentionMetadata,
    AttentionOptions,
    Query,
    first_visible,
    live,
    visible,
)
from jfp8kv.cache.pool import KVPool, Layer, LayerScales, read
from pallas_kernels.reference import scores, softmax


def attention(
    q: Query,
    pages: KVPool,
    scales: LayerScales | None,
    options: AttentionOptions,
    metadata: AttentionMetadata,
    *,
    layer: Layer,
) -> Query:
    """Return `softmax(q k^T) v` in float32 for one request; rows that see no key give zeros."""
    tokens, q_heads, head_dim = q.shape
    window = None if options.window is None else options.window[layer]
    k, v = read(pages, scales, layer=layer, page_table=metadata.page_table)
    kv_heads = k.shape[1]
    positions = jnp.arange(k.shape[0], dtype=jnp.int32)
    first = first_visible(metadata.start, window)
    known = live(positions, first=first, length=metadata.length)
    k = jnp.where(known[:, None, None], k, 0.0)
    v = jnp.where(known[:, None, None], v, 0.0)
    query = metadata.start + jnp.arange(tokens, dtype=jnp.int32)
    seen = visible(query, positions, length=metadata.length, window=window)
    sinks = jnp.zeros((q_heads, 0), jnp.float32)
    if options.sinks is not None:
        sinks = options.sinks[layer].astype(jnp.float32)[:, None]

    def one_query(
        q: Float[Array, " head_dim"],
        k: Float[Array, "keys head_dim"],
        v: Float[Array, "keys head_dim"],
        seen: Bool[Array, " keys"],
        sinks: Float[Array, " sinks"],
    ) -> Float[Array, " head_dim"]:
        score = scores(q, k, sm_scale=options.sm_scale, softcap=options.softcap)
        weights, _ = softmax(jnp.where(seen, score, -jnp.inf), sinks)
        return jnp.where(jnp.any(seen), weights, 0.0) @ v

    tokens_of_head = jax.vmap(one_query, in_axes=(0, None, None, 0, None))
    heads_of_group = jax.vmap(tokens_of_head, in_axes=(1, None, None, None, 0), out_axes=1)
    groups = jax.vmap(heads_of_group, in_axes=(1, 1, 1, None, 0), out_axes=1)
    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, -1, head_dim)
    with jax.default_matmul_precision("highest"):
        out = groups(grouped, k, v, seen, sinks.reshape(kv_heads, q_heads // kv_heads, -1))
    return out.reshape(tokens, q_heads, head_dim).astype(q.dtype)
