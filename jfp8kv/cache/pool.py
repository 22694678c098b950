"""The device side of the cache: one pool of pages, whose page axis folds the layers.

Page `p` of layer `l` is row `l * num_pages + p`, so a `lax.scan` over layers carries the whole pool and no layer is ever sliced
out of it; where windows put layers into groups (cache/groups.py), or formats differ (cache/layout.py), the layer's slot stands
for `l`. A token's place is (page, offset). A page holds values as `[kv_heads, page_size, head_dim]`, and keys so too or
transposed (`PoolLayout.keys_transposed`).

Everything here is written for one request. Under `vmap` over requests the pool itself stays one array: the writes of all
requests become one scatter into it (`custom_vmap`), in place when the caller donates it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, UInt8

from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout
from jfp8kv.cache.scales import KVScales, exponent_inverse, exponent_scale, token_head_exponent
from jfp8kv.core.batching import with_axis
from jfp8kv.core.formats import KVFormat, as_values, decode, encode, join_planes, split_planes
from jfp8kv.core.pytree import pytree, static

Layer = Int[Array, ""] | int


@pytree
class KVPool:
    """Keys and values of every layer. `real = stored * scale`.

    `k_bits` and `v_bits` hold the format's bits (core/formats.py says why); `k` and `v` show them as `float8`, both with tokens
    before channels. The exponents are there for dynamic scales alone, else None. Where layers differ, `only` gives the pool as
    layers of one kind see it; what is said of `fmt` and `dynamic` holds for such a view.
    """

    k_bits: Array  # stored bits [layer_pages, kv_heads, head_dim, page_size] if `layout.keys_transposed`, else like `v_bits`
    v_bits: Array  # stored bits [layer_pages, kv_heads, page_size, head_dim]
    k_exponent: UInt8[Array, "dynamic_layer_pages kv_heads page_size"] | None
    v_exponent: UInt8[Array, "dynamic_layer_pages kv_heads page_size"] | None
    layout: PoolLayout = static()

    @property
    def fmt(self) -> KVFormat:
        """The elements' format."""
        return self._kind.fmt

    @property
    def dynamic(self) -> bool:
        """Whether scales are stored in the pages."""
        return self._kind.dynamic

    @property
    def _kind(self) -> LayerCacheSpec:
        (kind,) = self.layout.distinct
        return kind

    @property
    def num_pages(self) -> int:
        """Page numbers there are, each a page in `layout.depth` slots."""
        return self.k_bits.shape[0] // self.layout.depth

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.v_bits.shape[2]

    def only(self, kind: LayerCacheSpec) -> "KVPool":
        """The same arrays, as layers of this kind see them."""
        if self.layout.distinct == (kind,):
            return self
        layout = dataclasses.replace(self.layout, kinds=(kind,) * len(self.layout.kinds))
        exponents = (self.k_exponent, self.v_exponent) if kind.dynamic else (None, None)
        return KVPool(self.k_bits, self.v_bits, *exponents, layout=layout)

    @property
    def first_rows(self) -> Int[Array, " layers"]:
        """The row of page number 0, by layer."""
        return jnp.asarray(self.layout.slots, jnp.int32) * self.num_pages

    @property
    def first_exponent_rows(self) -> Int[Array, " layers"]:
        """The same in the exponents."""
        return jnp.asarray(self.layout.exponent_slots, jnp.int32) * self.num_pages

    def rows(self, layer: Layer, numbers: Int[Array, " pages"]) -> Int[Array, " pages"]:
        """Rows of the pool for page numbers of `layer`; numbers past the end give rows past the end."""
        return self._rows(self.layout.slots, layer, numbers, self.k_bits)

    def exponent_rows(self, layer: Layer, numbers: Int[Array, " pages"]) -> Int[Array, " pages"]:
        """The same in the exponents."""
        return self._rows(self.layout.exponent_slots, layer, numbers, self.k_exponent)

    def _rows(
        self, slots: tuple[int, ...], layer: Layer, numbers: Int[Array, " pages"], pool: Array
    ) -> Int[Array, " pages"]:
        alike = slots == tuple(range(len(slots)))
        slot = jnp.int32(layer) if alike else jnp.asarray(slots, jnp.int32)[layer]
        return jnp.where(numbers < self.num_pages, slot * self.num_pages + numbers, pool.shape[0])

    def stored(self, pool: Array, rows: Int[Array, " pages"]) -> Array:
        """These rows of `k_bits` or `v_bits` as elements of `fmt`; rows past the end give some row that exists."""
        planes = self.fmt.stored.itemsize // pool.dtype.itemsize
        last = pool.shape[0] - 1
        found = [pool[jnp.minimum(rows + plane * self.num_pages, last)] for plane in range(planes)]
        return found[0] if planes == 1 else join_planes(found, self.fmt)

    def tokens_first(self, keys: Array) -> Array:
        """Keys as pages have them, with tokens before channels."""
        return keys.swapaxes(2, 3) if self.layout.keys_transposed else keys

    def exponents(
        self, pool: Array, rows: Int[Array, " pages"]
    ) -> UInt8[Array, "pages kv_heads page_size"]:
        """These rows of `k_exponent` or `v_exponent`; rows past the end give some row that exists."""
        return pool[jnp.minimum(rows, pool.shape[0] - 1)]

    @property
    def k(self) -> Array:
        """The keys as `fmt.dtype` (`float8_e4m3fn`, ...), `[layer_pages, kv_heads, page_size, head_dim]`. A copy."""
        return as_values(self.tokens_first(self.k_bits), self.fmt)

    @property
    def v(self) -> Array:
        """The values as `fmt.dtype`, of the same shape. A copy."""
        return as_values(self.v_bits, self.fmt)


@pytree
class LayerScales:
    """Static scales broadcast to `[layers, kv_heads, head_dim]`, with inverses taken once on the host.

    Writing multiplies by the inverse, so every backend rounds the same product. `k_offset` is subtracted from keys before that.
    Layers whose scales are dynamic use the offset alone.
    """

    k: Float[Array, "layers kv_heads head_dim"]
    v: Float[Array, "layers kv_heads head_dim"]
    k_inverse: Float[Array, "layers kv_heads head_dim"]
    v_inverse: Float[Array, "layers kv_heads head_dim"]
    k_offset: Float[Array, "layers kv_heads head_dim"] | None = None

    @classmethod
    def of(cls, scales: KVScales, *, layers: int, kv_heads: int, head_dim: int) -> "LayerScales":
        full = (layers, kv_heads, head_dim)
        values = (scales.k, scales.v, 1 / scales.k, 1 / scales.v, scales.k_offset)
        return cls(
            *(
                None if x is None else jnp.broadcast_to(jnp.asarray(x, jnp.float32), full)
                for x in values
            )
        )


def new_pool(
    layout: PoolLayout, *, num_pages: int, page_size: int, kv_heads: int, head_dim: int
) -> KVPool:
    """A pool of zeros: `num_pages` pages, of `page_size` tokens, in every slot of `layout`."""
    rows, dynamic_rows = layout.depth * num_pages, layout.exponent_depth * num_pages
    values = (page_size, head_dim)
    keys = values[::-1] if layout.keys_transposed else values
    k_bits, v_bits = (jnp.zeros((rows, kv_heads, *page), layout.stored) for page in (keys, values))
    exponents = [
        jnp.zeros((dynamic_rows, kv_heads, page_size), jnp.uint8) if dynamic_rows else None
        for _ in "kv"
    ]
    return KVPool(k_bits, v_bits, *exponents, layout=layout)


def page_bytes(layout: PoolLayout, *, page_size: int, kv_heads: int, head_dim: int) -> int:
    """Bytes one page number takes in all its slots, K and V, exponents included."""
    return (
        2
        * page_size
        * kv_heads
        * (layout.depth * head_dim * layout.stored.itemsize + layout.exponent_depth)
    )


KV = Float[Array, "tokens kv_heads head_dim"]


def switch_on_spec(layer: Layer, layout: PoolLayout, one: Callable[[LayerCacheSpec], Any]) -> Any:
    """`one` of the kind of `layer`, which may be traced: a branch for each kind there is."""
    kinds = layout.distinct
    if len(kinds) == 1:
        return one(kinds[0])
    which = jnp.asarray([kinds.index(kind) for kind in layout.kinds], jnp.int32)[layer]
    return lax.switch(which, [lambda kind=kind: one(kind) for kind in kinds])


def write(
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
    """Store tokens `start .. length-1` of one request in `layer`; rows of `k` and `v` past `length` are padding, dropped.

    `scales` are the static ones, and None where every layer is dynamic without an offset: each token and head is then scaled by
    its own power of two.
    """
    position = start + jnp.arange(k.shape[0], dtype=jnp.int32)
    entry = jnp.minimum(position // pages.page_size, page_table.shape[0] - 1)
    number = jnp.where(position < length, page_table[entry], pages.num_pages)
    offset = position % pages.page_size
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    if scales is not None and scales.k_offset is not None:
        k = k - scales.k_offset[layer]

    layout = pages.layout
    planes, k_exponent, v_exponent = switch_on_spec(
        layer, layout, lambda kind: _coded(kind, layout, scales, k, v, layer)
    )
    row, taken = (
        pages.rows(layer, number),
        jnp.asarray([layout.planes(kind) for kind in layout.kinds], jnp.int32),
    )
    k_bits, v_bits = pages.k_bits, pages.v_bits
    put_keys = _put_transposed if layout.keys_transposed else _put
    for plane, (k_plane, v_plane) in enumerate(planes):
        at = row + plane * pages.num_pages
        if plane:
            at = jnp.where(plane < taken[layer], at, k_bits.shape[0])
        k_bits, v_bits = put_keys(k_bits, at, offset, k_plane), _put(v_bits, at, offset, v_plane)
    exponents = pages.k_exponent, pages.v_exponent
    if layout.exponent_depth:
        dynamic = jnp.asarray([kind.dynamic for kind in layout.kinds])[layer]
        row = jnp.where(dynamic, pages.exponent_rows(layer, number), pages.k_exponent.shape[0])
        new = (k_exponent, v_exponent)
        exponents = tuple(
            _put(pool, row, offset, x) for pool, x in zip(exponents, new, strict=True)
        )
    return KVPool(k_bits, v_bits, *exponents, layout=layout)


def _coded(
    kind: LayerCacheSpec, layout: PoolLayout, scales: LayerScales | None, k: KV, v: KV, layer: Layer
) -> tuple:
    """K and V as a layer of this kind stores them, in as many planes as the widest kind has, and their exponents or None."""
    exponents: tuple = (None, None)
    if kind.dynamic:
        exponents = tuple(token_head_exponent(x, kind.fmt) for x in (k, v))
        factors = tuple(exponent_inverse(e)[..., None] for e in exponents)
    else:
        assert scales is not None, "static pages need scales"
        factors = scales.k_inverse[layer], scales.v_inverse[layer]
        if layout.exponent_depth:
            exponents = (jnp.zeros(k.shape[:2], jnp.uint8),) * 2
    most = max(layout.planes(each) for each in layout.distinct)
    k_planes, v_planes = (
        _planes(encode(x * f, kind.fmt), layout, most) for x, f in zip((k, v), factors, strict=True)
    )
    return tuple(zip(k_planes, v_planes, strict=True)), *exponents


def _planes(bits: Array, layout: PoolLayout, most: int) -> list[Array]:
    planes = [bits] if bits.dtype == layout.stored else split_planes(bits)
    return planes + [jnp.zeros_like(planes[0])] * (most - len(planes))


def fake_quant(
    kind: LayerCacheSpec, scales: LayerScales | None, k: KV, v: KV, *, layer: Layer
) -> tuple[Float[Array, "tokens kv_heads head_dim"], Float[Array, "tokens kv_heads head_dim"]]:
    """What a layer of this kind would give back of keys and values, without any pool: `read` of what `write` stores."""
    layout = PoolLayout.alike(kind.fmt, 1, dynamic=kind.dynamic)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    offset = None if scales is None or scales.k_offset is None else scales.k_offset[layer]
    (planes,), *exponents = _coded(
        kind, layout, scales, k if offset is None else k - offset, v, layer
    )
    factors = (
        [exponent_scale(e)[..., None] for e in exponents]
        if kind.dynamic
        else [scales.k[layer], scales.v[layer]]
    )
    k, v = (decode(bits, kind.fmt) * factor for bits, factor in zip(planes, factors, strict=True))
    return (k if offset is None else k + offset), v


def read(
    pages: KVPool, scales: LayerScales | None, *, layer: Layer, page_table: Int[Array, " pages"]
) -> tuple[KV, KV]:
    """Keys and values of one request in `layer`, real ones, float32: every slot of its pages, in the order of its tokens.

    What `write` stored comes back as it is there, an offset added again; slots never written hold anything. The whole text is
    decoded at once: for measuring and for oracles.
    """
    k, v = switch_on_spec(
        layer, pages.layout, lambda kind: _real(pages.only(kind), scales, layer, page_table)
    )
    return (k, v) if scales is None or scales.k_offset is None else (k + scales.k_offset[layer], v)


def _real(
    pages: KVPool, scales: LayerScales | None, layer: Layer, page_table: Array
) -> tuple[KV, KV]:
    rows = pages.rows(layer, page_table)
    values = (
        decode(pages.tokens_first(pages.stored(pages.k_bits, rows)), pages.fmt),
        decode(pages.stored(pages.v_bits, rows), pages.fmt),
    )
    if pages.dynamic:
        rows = pages.exponent_rows(layer, page_table)
        exponents = (pages.exponents(pool, rows) for pool in (pages.k_exponent, pages.v_exponent))
        factors = [exponent_scale(e)[..., None] for e in exponents]
    else:
        assert scales is not None, "static pages need scales"
        factors = [scale[layer][:, None, :] for scale in (scales.k, scales.v)]
    real = [
        x * f for x, f in zip(values, factors, strict=True)
    ]  # [pages, kv_heads, page_size, head_dim]
    k, v = (x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in real)
    return k, v


def _scatter(
    place: Callable[[Array, Array], tuple],
) -> Callable[[Array, Array, Array, Array], Array]:
    """`pool[place(row, offset)] = values`, rows past the end dropped; under `vmap` one scatter for all requests."""

    @custom_vmap
    def scatter(pool: Array, row: Array, offset: Array, values: Array) -> Array:
        return pool.at[place(row, offset)].set(values, mode="drop")

    @scatter.def_vmap
    def requests(
        axis_size: int, in_batched: list[bool], pool: Array, *args: Array
    ) -> tuple[Array, bool]:
        """The requests' tokens, one after another, into the one pool they share."""
        assert not in_batched[0], "the pool is shared by the requests: vmap it with in_axes=None"
        flat = [x.reshape(-1, *x.shape[2:]) for x in with_axis(axis_size, in_batched[1:], args)]
        return scatter(pool, *flat), False

    return scatter


_put = _scatter(lambda row, offset: (row, slice(None), offset))
_put_transposed = _scatter(lambda row, offset: (row, slice(None), slice(None), offset))


def poison(pages: KVPool, code: int) -> KVPool:
    """The pool with every stored byte or word set to `code` (`fmt.nan_code` poisons it; 0xFF a pool of several formats),
    exponents to all ones."""
    bits = jax.tree.map(
        lambda x: jnp.full_like(x, code if x.dtype != jnp.float32 else jnp.nan),
        (pages.k_bits, pages.v_bits),
    )
    exponents = [
        None if e is None else jnp.full_like(e, 255) for e in (pages.k_exponent, pages.v_exponent)
    ]
    return KVPool(*bits, *exponents, layout=pages.layout)
