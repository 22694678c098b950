"""Reference attention: gather and decode every key, softmax, weighted sum.

The fast implementations are tested against it. It needs memory for the whole context in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jfp8kv.attention.interface import (
    AttentionMetadata,
    AttentionOptions,
    KVPool,
    Layer,
    LayerScales,
    Query,
)
from jfp8kv.attention.masks import first_visible, live, visible
from jfp8kv.cache.pool import read
from pallas_kernels.reference import scores, softmax


def attention(
    q: Query,
    pages: KVPool,
    scales: LayerScales | None,
    options: AttentionOptions,
    at: AttentionMetadata,
    *,
    layer: Layer,
) -> Query:
    """Return `softmax(q k^T) v` in float32 for one request; rows that see no key give zeros."""
    tokens, q_heads, head_dim = q.shape
    window = None if options.window is None else options.window[layer]
    k, v = read(pages, scales, layer=layer, page_table=at.page_table)
    kv_heads = k.shape[1]
    positions = jnp.arange(k.shape[0], dtype=jnp.int32)
    known = live(positions, first=first_visible(at.start, window), length=at.length)
    k = jnp.where(known[:, None, None], k, 0.0)
    v = jnp.where(known[:, None, None], v, 0.0)
    query = at.start + jnp.arange(tokens, dtype=jnp.int32)
    seen = visible(query, positions, length=at.length, window=window)
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

    of_token = jax.vmap(one_query, in_axes=(0, None, None, 0, None))
    of_group = jax.vmap(of_token, in_axes=(1, None, None, None, 0), out_axes=1)
    of_heads = jax.vmap(of_group, in_axes=(1, 1, 1, None, 0), out_axes=1)
    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, -1, head_dim)
    with jax.default_matmul_precision("highest"):
        out = of_heads(grouped, k, v, seen, sinks.reshape(kv_heads, q_heads // kv_heads, -1))
    return out.reshape(tokens, q_heads, head_dim).astype(q.dtype)
