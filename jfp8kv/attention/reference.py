"""Attention as one would write it on a blackboard: gather every key, decode, softmax, sum.

The oracle the fast implementations are tested against. Needs memory for the whole context in float32.
"""

import jax.numpy as jnp

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


def attention(
    q: Query,
    pages: KVPool,
    scales: LayerScales | None,
    options: AttentionOptions,
    at: AttentionMetadata,
    *,
    layer: Layer,
) -> Query:
    """`softmax(q k^T) v` in float32 for one request; rows that see no key give zeros."""
    tokens, q_heads, head_dim = q.shape
    window = None if options.window is None else options.window[layer]
    first = first_visible(at.start, window)
    k, v = read(pages, scales, layer=layer, page_table=at.page_table)
    positions = jnp.arange(k.shape[0], dtype=jnp.int32)
    known = live(positions, first=first, length=at.length)[:, None, None]
    k, v = jnp.where(known, k, 0.0), jnp.where(known, v, 0.0)
    kv_heads = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)

    scores = jnp.einsum("thgd,nhd->htgn", grouped, k, precision="highest") * options.sm_scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    query = at.start + jnp.arange(tokens, dtype=jnp.int32)
    mask = visible(query, positions, length=at.length, window=window)[None, :, None, :]
    scores = jnp.where(mask, scores, -jnp.inf)

    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-1e30)
    sink = jnp.zeros((), jnp.float32)
    if options.sinks is not None:
        logits = options.sinks[layer].astype(jnp.float32).reshape(kv_heads, 1, -1, 1)
        peak = jnp.maximum(peak, logits)
        sink = jnp.exp(logits - peak)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True) + sink
    weights = weights / jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("htgn,nhd->thgd", weights, v, precision="highest")
    return out.reshape(tokens, q_heads, head_dim).astype(q.dtype)
