"""Attention in plain XLA: a loop over tiles of pages with online softmax.

Only the current tile is decoded, so the cache is read at its stored width (online softmax: Rabe and
Staats, arXiv:2112.05682). Scales cost nothing inside the loop: the softmax factor, static K scales
and the `tile_factor` of the format fold into the query, static V scales into the output. Dynamic
scales multiply the scores and the weights.

A tile is several pages: large enough that the time of its two matmuls outweighs the overhead of the
loop, and small enough for the caches of a CPU.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jfp8kv.attention.interface import (
    AttentionMetadata,
    AttentionOptions,
    Query,
    first_visible,
    live,
    score_offset,
    visible,
)
from jfp8kv.cache.pool import KVPool, Layer, LayerScales
from jfp8kv.cache.scales import exponent_scale
from jfp8kv.core.formats import decode_tile
from pallas_kernels.reference import LOWEST, MASKED

DECODE_TILE_TOKENS = 128
PREFILL_TILE_TOKENS = 256
MAX_DECODE_QUERIES = 2  # per request; batches with more queries count as prefill


class _Tile(NamedTuple):
    """The rows of one tile in the pool and in the exponents."""

    rows: Int[Array, " pages"]
    exponent_rows: Int[Array, " pages"] | None


def attention(
    q: Query,
    pages: KVPool,
    scales: LayerScales | None,
    options: AttentionOptions,
    metadata: AttentionMetadata,
    *,
    layer: Layer,
) -> Query:
    """Return `softmax(q k^T) v` for one request, accumulated in float32.

    Rows that see no key give zeros.
    """
    tokens, q_heads, head_dim = q.shape
    window = None if options.window is None else options.window[layer]
    kv_heads = pages.k_bits.shape[1]
    group = q_heads // kv_heads
    tile_tokens = DECODE_TILE_TOKENS if tokens <= MAX_DECODE_QUERIES else PREFILL_TILE_TOKENS
    tile_pages = max(1, tile_tokens // pages.page_size)
    tile = tile_pages * pages.page_size
    queries = _query_rows(q, pages, scales, options, layer)
    offset = score_offset(q, scales, options, layer)
    if offset is not None:
        offset = offset.reshape(tokens, kv_heads, group).swapaxes(0, 1).reshape(kv_heads, -1)
    table = _pad_table(metadata.page_table, tile_pages, pages.num_pages)
    first = first_visible(metadata.start, window)
    first_tile = first // tile

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        i = first_tile + i
        entries = lax.dynamic_slice(table, (i * tile_pages,), (tile_pages,))
        at = _Tile(
            pages.rows(layer, entries),
            pages.exponent_rows(layer, entries) if pages.dynamic else None,
        )
        position = i * tile + jnp.arange(tile, dtype=jnp.int32)

        scores = _scores(queries, offset, pages, at, options)
        seen = _seen(metadata, position, window, tokens, group)
        scores = jnp.where(seen, scores, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.exp(scores - new_peak[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        known = live(position, first=first, length=metadata.length)
        out = out * shrink[..., None] + _weighted_values(weights, pages, at, known, queries.dtype)
        return new_peak, total, out

    peak, total = _initial(options, layer, kv_heads, tokens, group)
    out = jnp.zeros((kv_heads, tokens * group, head_dim), jnp.float32)
    tiles = _num_tiles(metadata.max_length, window, tokens, tile)
    _, total, out = lax.fori_loop(0, tiles, body, (peak, total, out))

    out = out * (pages.fmt.tile_factor / jnp.where(total == 0, 1.0, total))[..., None]
    if not pages.dynamic:
        assert scales is not None, "static pages need scales"
        out = out * scales.v[layer][:, None, :]
    out = out.reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(tokens, q_heads, head_dim).astype(q.dtype)


def _query_rows(
    q: Query, pages: KVPool, scales: LayerScales | None, options: AttentionOptions, layer: Layer
) -> Float[Array, "kv_heads rows head_dim"]:
    """Return the query rows of each KV head, token by token, times all static factors of scores."""
    tokens, q_heads, head_dim = q.shape
    kv_heads = pages.k_bits.shape[1]
    # Prefill in bfloat16 uses bfloat16 matmuls. float16 would overflow with the factors.
    is_prefill = tokens > MAX_DECODE_QUERIES
    dtype = q.dtype if is_prefill and q.dtype == jnp.bfloat16 else jnp.float32
    rows = q.astype(jnp.float32).reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)
    rows = rows.transpose(1, 0, 2, 3) * (options.sm_scale * pages.fmt.tile_factor)
    if not pages.dynamic:
        assert scales is not None, "static pages need scales"
        rows = rows * scales.k[layer][:, None, None, :]
    return rows.reshape(kv_heads, -1, head_dim).astype(dtype)


def _num_tiles(max_length: Array, window: Array | None, tokens: int, tile: int) -> Array:
    """Return the number of tiles to visit, which is the same for all requests.

    These are the tiles of the longest sequence, or all that the keys of a window can touch.
    """
    tiles = (max_length + (tile - 1)) // tile
    if window is None:
        return tiles
    of_window = jnp.minimum(tiles, (window + tokens - 3) // tile + 2)
    return jnp.where(window == 0, tiles, of_window)


def _scores(
    queries: Array, offset: Array | None, pages: KVPool, at: _Tile, options: AttentionOptions
) -> Float[Array, "kv_heads rows tile"]:
    """Return the scores of all query rows with the keys of a tile, before masking."""
    token_axis = 3 if pages.layout.keys_transposed else 2
    k = decode_tile(_join_pages(pages.gather(pages.k_bits, at.rows), token_axis), pages.fmt)
    equation = "hqd,hdn->hqn" if pages.layout.keys_transposed else "hqd,hnd->hqn"
    scores = _matmul(equation, queries, k.astype(queries.dtype))
    if at.exponent_rows is not None:
        exponents = pages.gather_exponents(pages.k_exponent, at.exponent_rows)
        scores = scores * exponent_scale(_join_pages(exponents, 2))[:, None, :]
    if offset is not None:
        scores = scores + offset[..., None]
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    return scores


def _seen(
    metadata: AttentionMetadata, position: Array, window: Array | None, tokens: int, group: int
) -> Bool[Array, "rows tile"]:
    """Return which keys of a tile each query row sees."""
    query = metadata.start + jnp.arange(tokens, dtype=jnp.int32)
    seen = visible(query, position, length=metadata.length, window=window)
    return jnp.repeat(seen, group, axis=0)


def _weighted_values(
    weights: Array, pages: KVPool, at: _Tile, known: Array, dtype: jnp.dtype
) -> Float[Array, "kv_heads rows head_dim"]:
    """Return the sum of the values of a tile, times their weights."""
    # Unwritten slots may contain NaN codes, and 0 * NaN is NaN: clear their bits first.
    v_bits = _join_pages(pages.gather(pages.v_bits, at.rows), 2)
    v_bits = jnp.where(known[None, :, None], v_bits, jnp.zeros((), pages.fmt.storage_dtype))
    if at.exponent_rows is not None:
        exponents = pages.gather_exponents(pages.v_exponent, at.exponent_rows)
        v_scale = exponent_scale(_join_pages(exponents, 2))
        weights = weights * jnp.where(known, v_scale, 0.0)[:, None, :]
    v = decode_tile(v_bits, pages.fmt).astype(dtype)
    return _matmul("hqn,hnd->hqd", weights.astype(dtype), v)


def _initial(
    options: AttentionOptions, layer: Layer, kv_heads: int, tokens: int, group: int
) -> tuple[Array, Array]:
    """Return the running maximum and sum before the first key.

    With sinks they are those of the sink: its logit, and 1.
    """
    shape = (kv_heads, tokens, group)
    if options.sinks is None:
        peak = jnp.full(shape, LOWEST, jnp.float32)
        total = jnp.zeros(shape, jnp.float32)
    else:
        sinks = options.sinks[layer].astype(jnp.float32).reshape(kv_heads, 1, group)
        peak = jnp.broadcast_to(sinks, shape)
        total = jnp.ones(shape, jnp.float32)
    return peak.reshape(kv_heads, -1), total.reshape(kv_heads, -1)


def _pad_table(table: Array, multiple: int, sentinel: int) -> Array:
    """Pad the page table to whole tiles."""
    missing = -table.shape[0] % multiple
    return jnp.pad(table, (0, missing), constant_values=sentinel) if missing else table


def _join_pages(pages: Array, token_axis: int) -> Array:
    """Concatenate pages along their tokens: `[kv_heads, ..., tile, ...]`."""
    x = jnp.moveaxis(pages, 0, token_axis - 1)
    return x.reshape(*x.shape[: token_axis - 1], -1, *x.shape[token_axis + 1 :])


def _matmul(equation: str, a: Array, b: Array) -> Float[Array, "h q n"]:
    """Return the einsum of `a` and `b`, accumulated in float32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
