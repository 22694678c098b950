"""The interface of paged attention: arguments of backends, visible keys of queries, and `attend`.

A backend is a function of one request, batched with `vmap` (the pool is not batched). It receives a
pool whose layers have one spec (`KVPool.for_spec`), whose elements may be byte-split
(`KVPool.gather`) and whose keys may be transposed (`PoolLayout.keys_transposed`). All backends read
the same stored bytes and agree within rounding, or raise `NotSupported`.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jfp8kv.cache import pool
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, switch_on_spec
from jfp8kv.core.pytree import pytree, static

Query: TypeAlias = Float[Array, "tokens q_heads head_dim"]


@pytree
class AttentionMetadata:
    """Where a request is in the cache, and which of its tokens are queries.

    Attributes:
      page_table: page numbers of the layer's group. Entries past the pages of the request, and of
        pages before the window of every query, are ignored.
      start: position of the first query; the others follow it.
      length: tokens in the cache, including those of the queries. Queries at `length` or beyond
        are padding.
      max_length: upper bound of `length` over all requests of the batch; backends stop there.
    """

    page_table: Int[Array, " pages"]
    start: Int[Array, ""]
    length: Int[Array, ""]
    max_length: Int[Array, ""]


@pytree
class AttentionOptions:
    """Options of attention that depend on the model.

    Attributes:
      window: by layer, a query at `p` sees keys `p - window + 1 .. p`; 0 for all keys. An array,
        so that layers may differ under `scan`.
      sinks: one logit per query head, added to the denominator of the softmax without a value
        (gpt-oss; arXiv:2309.17453).
      sm_scale: the factor on scores.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118,
        section 2).
    """

    window: Int[Array, " layers"] | None = None
    sinks: Float[Array, "layers q_heads"] | None = None
    sm_scale: float = static(default=1.0)
    softcap: float | None = static(default=None)


@runtime_checkable
class Attention(Protocol):
    """A backend: `softmax(q k^T) v` for one request. Rows that see no key give zeros."""

    def __call__(
        self,
        q: Query,
        pages: KVPool,
        scales: LayerScales | None,
        options: AttentionOptions,
        metadata: AttentionMetadata,
        *,
        layer: Layer,
    ) -> Query:
        """Return the outputs of the queries of one request in `layer`."""


@runtime_checkable
class Write(Protocol):
    """A function that stores new tokens of one request: see `cache.pool.write`."""

    def __call__(
        self,
        pages: KVPool,
        scales: LayerScales | None,
        k: KV,
        v: KV,
        *,
        layer: Layer,
        page_table: Int[Array, " pages"],
        start: Int[Array, ""],
        length: Int[Array, ""],
    ) -> KVPool:
        """Store tokens `start .. length - 1` of one request in `layer`."""


Attend: TypeAlias = Callable[[Layer, Query, KV, KV, KVPool], tuple[Query, KVPool]]


def paged_attend(
    attention: Attention,
    scales: LayerScales | None,
    options: AttentionOptions,
    metadata: Callable[[Layer], AttentionMetadata],
    *,
    write: Write = pool.write,
) -> Attend:
    """Return `attend(layer, q, k, v, pages) -> (out, pages)`, the function that a model calls.

    `attend` first writes the new tokens and then reads the pool: queries see the stored key and
    value even of the same token. So chunked prefill, whole prefill, a reused prefix and a
    recomputed sequence all see the same numbers. If layers have different specs, there is one
    branch per spec, which only reads the pool.

    Args:
      attention: the backend.
      scales: static scales; None if every layer has dynamic ones.
      options: of the model.
      metadata: returns the metadata of the request for a layer.
      write: the function that stores new tokens.
    """

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
            lambda spec: attention(q, pages.for_spec(spec), scales, options, at, layer=layer),
        )
        return out, pages

    return attend


def visible(
    query: Int[Array, " tokens"],
    key: Int[Array, " keys"],
    *,
    length: Int[Array, ""],
    window: Int[Array, ""] | None = None,
) -> Bool[Array, "tokens keys"]:
    """Return the attention mask: keys that are not later than the query, cached and in the window.

    Args:
      query, key: positions.
      length: tokens in the cache.
      window: a window of `w` covers the query and the `w - 1` tokens before it; 0 for no window.
    """
    q = query[:, None]
    k = key[None, :]
    seen = (k <= q) & (k < length)
    if window is not None:
        seen &= (q - k < window) | (window == 0)
    return seen


def first_visible(start: Int[Array, ""], window: Int[Array, ""] | None) -> Int[Array, ""]:
    """Return the first position that a query at `start` or later sees."""
    if window is None:
        return jnp.zeros_like(start)
    return jnp.where(window == 0, 0, jnp.maximum(start - window + 1, 0))


def live(
    key: Int[Array, " keys"], *, first: Int[Array, ""], length: Int[Array, ""]
) -> Bool[Array, " keys"]:
    """Return the mask of positions that at least one query sees.

    Other slots may contain anything, such as NaN codes, so their values must be cleared: masking
    the scores is not enough.
    """
    return (key >= first) & (key < length)


def score_offset(
    q: Query, scales: LayerScales | None, options: AttentionOptions, layer: Layer
) -> Float[Array, "tokens q_heads"] | None:
    """Return what the K offset adds to the scores of each query, or None if it has no effect.

    It adds the same amount to all scores of a query, which only matters with a softcap or a sink: a
    softmax ignores it. Computed in float32, because the offset is the large part of such keys.
    """
    if scales is None or scales.k_offset is None:
        return None
    if options.softcap is None and options.sinks is None:
        return None
    offset = scales.k_offset[layer]
    kv_heads, head_dim = offset.shape
    grouped = q.astype(jnp.float32).reshape(q.shape[0], kv_heads, -1, head_dim)
    shift = jnp.einsum("thgd,hd->thg", grouped, offset, precision="highest") * options.sm_scale
    return shift.reshape(q.shape[:2])
