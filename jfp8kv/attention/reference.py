"""Attention as one would write it on a blackboard: gather every key, decode, softmax, sum.

The oracle the fast implementations are tested against. Needs memory for the whole context in float32.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jfp8kv.attention.contract import AttentionOptions, KVPages, Layer, LayerScales, Query, Where
from jfp8kv.attention.masks import first_visible, live, visible
from jfp8kv.cache.scales import exponent_scale
from jfp8kv.core.formats import decode


def _gather(
    bits: Array, exponent: Array | None, scale: Array | None, pages: KVPages, at: Where, first: Array, layer: Layer
) -> Array:
    """One request's real values, `[kv_heads, tokens, head_dim]`, of `[layer_pages, kv_heads, page_size, head_dim]` stored ones.

    Slots before `first` and past its length are zero.
    """
    rows = jnp.minimum(pages.rows(layer, at.page_table), bits.shape[0] - 1)
    values = decode(bits[rows], pages.fmt)  # [pages, kv_heads, page_size, head_dim]
    if exponent is not None:
        values = values * exponent_scale(exponent[rows])[..., None]
    values = jnp.moveaxis(values, 0, 1).reshape(bits.shape[1], -1, bits.shape[3])
    known = live(jnp.arange(values.shape[1], dtype=jnp.int32), first=first, length=at.length)
    values = jnp.where(known[None, :, None], values, 0.0)
    return values if scale is None else values * scale[layer][:, None, :]


def attention(
    q: Query, pages: KVPages, scales: LayerScales | None, options: AttentionOptions, at: Where, *, layer: Layer
) -> Query:
    """`softmax(q k^T) v` in float32 for one request; rows that see no key give zeros."""
    tokens, q_heads, head_dim = q.shape
    window = None if options.window is None else options.window[layer]
    first = first_visible(at.start, window)
    k_bits = pages.k_bits.swapaxes(2, 3)
    k = _gather(k_bits, pages.k_exponent, None if scales is None else scales.k, pages, at, first, layer)
    v = _gather(pages.v_bits, pages.v_exponent, None if scales is None else scales.v, pages, at, first, layer)
    kv_heads = k.shape[0]
    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)

    scores = jnp.einsum("thgd,hnd->htgn", grouped, k, precision="highest") * options.sm_scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    positions = jnp.arange(k.shape[1], dtype=jnp.int32)
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
    out = jnp.einsum("htgn,hnd->thgd", weights, v, precision="highest")
    return out.reshape(tokens, q_heads, head_dim).astype(q.dtype)
