"""Attention in plain XLA, fast without any custom kernel: a loop over tiles of pages with a running softmax.

Only the tile at hand is decoded, so the cache is read at its stored width (Rabe and Staats, arXiv:2112.05682, for the running
softmax). Scales cost nothing inside the loop: the softmax factor, static K scales and the format's `tile_factor` are folded
into the query, static V scales into the output. Dynamic scales multiply the scores and the probabilities.

A tile is several pages: large enough that its two products outweigh the loop around them, small enough for the caches.
"""

import jax.numpy as jnp
from jax import lax
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
from jfp8kv.cache.scales import exponent_scale
from jfp8kv.core.formats import decode_tile
from pallas_kernels.elements import LOWEST, MASKED

DECODE_TILE_TOKENS, PREFILL_TILE_TOKENS = 128, 256
Here = tuple[Array, Array | None]  # a tile's rows of the pool, and of the exponents


def attention(
    q: Query,
    pages: KVPool,
    scales: LayerScales | None,
    options: AttentionOptions,
    at: AttentionMetadata,
    *,
    layer: Layer,
) -> Query:
    """`softmax(q k^T) v` for one request, accumulated in float32; rows that see no key give zeros."""
    tokens, q_heads, head_dim = q.shape
    window = None if options.window is None else options.window[layer]
    kv_heads = pages.k_bits.shape[1]
    group = q_heads // kv_heads
    tile_pages = max(
        1, (DECODE_TILE_TOKENS if tokens <= 2 else PREFILL_TILE_TOKENS) // pages.page_size
    )
    tile = tile_pages * pages.page_size
    rows = _query_rows(q, pages, scales, options, layer)
    shift = _shift(q, kv_heads, scales, options, layer)
    table = _padded(at.page_table, tile_pages, pages.num_pages)

    first = first_visible(at.start, window)
    first_tile = first // tile

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        i = first_tile + i
        entries = lax.dynamic_slice(table, (i * tile_pages,), (tile_pages,))
        here = (
            pages.rows(layer, entries),
            pages.exponent_rows(layer, entries) if pages.dynamic else None,
        )
        position = i * tile + jnp.arange(tile, dtype=jnp.int32)

        scores = _scores(rows, shift, pages, here, options)
        scores = jnp.where(_seen(at, position, window, tokens, group), scores, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.exp(scores - new_peak[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        known = live(position, first=first, length=at.length)
        out = out * shrink[..., None] + _weighted_values(weights, pages, here, known, rows.dtype)
        return new_peak, total, out

    peak, total = _initial(options, layer, kv_heads, tokens, group)
    out = jnp.zeros((kv_heads, tokens * group, head_dim), jnp.float32)
    _, total, out = lax.fori_loop(
        0, _tiles(at.most_tokens, window, tokens, tile), body, (peak, total, out)
    )

    out = out * (pages.fmt.tile_factor / jnp.where(total == 0, 1.0, total))[..., None]
    if not pages.dynamic:
        out = out * scales.v[layer][:, None, :]
    out = out.reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(tokens, q_heads, head_dim).astype(q.dtype)


def _query_rows(
    q: Query, pages: KVPool, scales: LayerScales | None, options: AttentionOptions, layer: Layer
) -> Float[Array, "kv_heads rows head_dim"]:
    """The queries of each KV head, token by token, with every static factor on the scores in them."""
    tokens, q_heads, head_dim = q.shape
    kv_heads = pages.k_bits.shape[1]
    # Prefill in bfloat16 multiplies in it. float16 would overflow with the factors in.
    dtype = q.dtype if tokens > 2 and q.dtype == jnp.bfloat16 else jnp.float32
    rows = (
        q.astype(jnp.float32)
        .reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)
        .transpose(1, 0, 2, 3)
    )
    rows = rows * (options.sm_scale * pages.fmt.tile_factor)
    if not pages.dynamic:
        rows = rows * scales.k[layer][:, None, None, :]
    return rows.reshape(kv_heads, -1, head_dim).astype(dtype)


def _shift(
    q: Query, kv_heads: int, scales: LayerScales | None, options: AttentionOptions, layer: Layer
) -> Float[Array, "kv_heads rows"] | None:
    """What the K offset adds to each query's scores. All of a row's scores alike, which a softmax does not see: so only where
    a cap or a sink does. Float32: the offset is what is large about such keys."""
    if (
        scales is None
        or scales.k_offset is None
        or (options.softcap is None and options.sinks is None)
    ):
        return None
    grouped = q.astype(jnp.float32).reshape(q.shape[0], kv_heads, -1, q.shape[2])
    shift = (
        jnp.einsum("thgd,hd->htg", grouped, scales.k_offset[layer], precision="highest")
        * options.sm_scale
    )
    return shift.reshape(kv_heads, -1)


def _tiles(most_tokens: Array, window: Array | None, tokens: int, tile: int) -> Array:
    """Tiles to go through, the same for all requests: up to the longest text, or as many as a window's keys can touch."""
    tiles = (most_tokens + (tile - 1)) // tile
    return (
        tiles
        if window is None
        else jnp.where(window == 0, tiles, jnp.minimum(tiles, (window + tokens - 3) // tile + 2))
    )


def _scores(
    rows: Array, shift: Array | None, pages: KVPool, here: Here, options: AttentionOptions
) -> Float[Array, "kv_heads rows tile"]:
    axis, product = (3, "hqd,hdn->hqn") if pages.layout.keys_transposed else (2, "hqd,hnd->hqn")
    k = decode_tile(_tile(pages.stored(pages.k_bits, here[0]), axis=axis), pages.fmt).astype(
        rows.dtype
    )
    scores = _dot(product, rows, k)
    if pages.dynamic:
        scores = (
            scores
            * exponent_scale(_tile(pages.exponents(pages.k_exponent, here[1]), axis=2))[:, None, :]
        )
    if shift is not None:
        scores = scores + shift[..., None]
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    return scores


def _seen(
    at: AttentionMetadata, position: Array, window: Array | None, tokens: int, group: int
) -> Bool[Array, "rows tile"]:
    """Which keys each row of queries sees."""
    query = at.start + jnp.arange(tokens, dtype=jnp.int32)
    return jnp.repeat(visible(query, position, length=at.length, window=window), group, axis=0)


def _weighted_values(
    weights: Array, pages: KVPool, here: Here, known: Array, dtype: jnp.dtype
) -> Float[Array, "kv_heads rows head_dim"]:
    # Unwritten slots may hold NaN codes, and 0 * NaN is NaN: their bits are cleared before anything is multiplied.
    v_bits = _tile(pages.stored(pages.v_bits, here[0]), axis=2)
    v_bits = jnp.where(known[None, :, None], v_bits, jnp.zeros((), pages.fmt.stored))
    if pages.dynamic:
        v_scale = exponent_scale(_tile(pages.exponents(pages.v_exponent, here[1]), axis=2))
        weights = weights * jnp.where(known, v_scale, 0.0)[:, None, :]
    return _dot("hqn,hnd->hqd", weights.astype(dtype), decode_tile(v_bits, pages.fmt).astype(dtype))


def _initial(
    options: AttentionOptions, layer: Layer, kv_heads: int, tokens: int, group: int
) -> tuple[Array, Array]:
    """Running maximum and sum before any key: empty, or the sink alone, whose weight at its own maximum is 1."""
    shape = (kv_heads, tokens, group)
    if options.sinks is None:
        peak, total = jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        sinks = options.sinks[layer].astype(jnp.float32).reshape(kv_heads, 1, group)
        peak, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)
    return peak.reshape(kv_heads, -1), total.reshape(kv_heads, -1)


def _padded(table: Array, multiple: int, sentinel: int) -> Array:
    """The page table with whole tiles of entries."""
    missing = -table.shape[0] % multiple
    return jnp.pad(table, (0, missing), constant_values=sentinel) if missing else table


def _tile(pages: Array, *, axis: int) -> Array:
    """Pages side by side along their tokens, which are `axis` of them: `[kv_heads, ..., tile, ...]`."""
    x = jnp.moveaxis(pages, 0, axis - 1)
    return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])


def _dot(equation: str, a: Array, b: Array) -> Float[Array, "h q n"]:
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
