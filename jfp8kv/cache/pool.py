"""The page pool on the device: one array of pages, whose first axis folds the layers.

Page `p` of layer `l` is row `l * num_pages + p`, so a `lax.scan` over layers carries the whole pool
and no layer is ever sliced out of it. Where windows form layer groups (cache/groups.py), or formats
differ (cache/layout.py), the layer slot replaces `l`. A token is stored at (page, offset). A page
stores values as `[kv_heads, page_size, head_dim]`, and keys with the same axes or transposed
(`PoolLayout.keys_transposed`).

All functions are written for one request. Under `vmap` over requests the pool itself stays one
array: the writes of all requests become one scatter into it (`custom_vmap`), in place if the caller
donates it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, UInt8

from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout
from jfp8kv.cache.scales import KVScales, exponent_inverse, exponent_scale, token_head_exponent
from jfp8kv.core.formats import KVFormat, as_values, decode, encode, join_bytes, split_bytes
from jfp8kv.core.pytree import broadcast_unbatched, pytree, static

Layer = Int[Array, ""] | int
KV = Float[Array, "tokens kv_heads head_dim"]
T = TypeVar("T")


@pytree
class KVPool:
    """Keys and values of every layer. `real = stored * scale`.

    If layers have different specs, `for_spec` returns a view of the pool for the layers of one
    spec. `spec`, `fmt` and `dynamic` are only defined for such a view.

    Attributes:
      k_bits: stored keys `[layer_pages, kv_heads, page_size, head_dim]`, or
        `[layer_pages, kv_heads, head_dim, page_size]` if `layout.keys_transposed`.
      v_bits: stored values `[layer_pages, kv_heads, page_size, head_dim]`.
      k_exponent, v_exponent: dynamic scales; None if no layer has any.
      layout: which rows belong to which layer.
    """

    k_bits: Array
    v_bits: Array
    k_exponent: UInt8[Array, "dynamic_layer_pages kv_heads page_size"] | None
    v_exponent: UInt8[Array, "dynamic_layer_pages kv_heads page_size"] | None
    layout: PoolLayout = static()

    @property
    def spec(self) -> LayerCacheSpec:
        """What each layer stores."""
        (spec,) = self.layout.distinct
        return spec

    @property
    def fmt(self) -> KVFormat:
        """The format of the elements."""
        return self.spec.fmt

    @property
    def dynamic(self) -> bool:
        """Whether scales are stored next to the pages."""
        return self.spec.dynamic

    @property
    def byte_split(self) -> bool:
        """Whether the bytes of an element are stored in several layer slots."""
        return self.fmt.storage_dtype.itemsize > self.k_bits.dtype.itemsize

    @property
    def num_pages(self) -> int:
        """The number of page numbers. Each has a page in `layout.depth` layer slots."""
        return self.k_bits.shape[0] // self.layout.depth

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.v_bits.shape[2]

    def for_spec(self, spec: LayerCacheSpec) -> "KVPool":
        """Return a view of the same arrays in which every layer has this spec."""
        if self.layout.distinct == (spec,):
            return self
        layout = dataclasses.replace(self.layout, specs=(spec,) * len(self.layout.specs))
        return KVPool(
            self.k_bits,
            self.v_bits,
            self.k_exponent if spec.dynamic else None,
            self.v_exponent if spec.dynamic else None,
            layout=layout,
        )

    @property
    def first_rows(self) -> Int[Array, " layers"]:
        """By layer, the row of the page with number 0."""
        return jnp.asarray(self.layout.slots, jnp.int32) * self.num_pages

    @property
    def first_exponent_rows(self) -> Int[Array, " layers"]:
        """By layer, the row of the page with number 0 in the exponents."""
        return jnp.asarray(self.layout.exponent_slots, jnp.int32) * self.num_pages

    def rows(self, layer: Layer, numbers: Int[Array, " pages"]) -> Int[Array, " pages"]:
        """Return the rows of page numbers in `layer`; numbers past the end stay past the end."""
        return self._rows(self.layout.slots, layer, numbers, self.k_bits.shape[0])

    def exponent_rows(self, layer: Layer, numbers: Int[Array, " pages"]) -> Int[Array, " pages"]:
        """Return the rows of page numbers in the exponents of `layer`, which must be dynamic."""
        assert self.k_exponent is not None
        return self._rows(self.layout.exponent_slots, layer, numbers, self.k_exponent.shape[0])

    def _rows(
        self, slots: tuple[int, ...], layer: Layer, numbers: Int[Array, " pages"], end: int
    ) -> Int[Array, " pages"]:
        if slots == tuple(range(len(slots))):
            slot = jnp.int32(layer)
        else:
            slot = jnp.asarray(slots, jnp.int32)[layer]
        return jnp.where(numbers < self.num_pages, slot * self.num_pages + numbers, end)

    def gather(self, bits: Array, rows: Int[Array, " pages"]) -> Array:
        """Return rows of `k_bits` or `v_bits` as elements of `fmt`; clamps rows past the end."""
        parts = self.fmt.storage_dtype.itemsize // bits.dtype.itemsize
        last = bits.shape[0] - 1
        found = [bits[jnp.minimum(rows + part * self.num_pages, last)] for part in range(parts)]
        return found[0] if parts == 1 else join_bytes(found, self.fmt)

    def gather_exponents(
        self, exponents: UInt8[Array, "_ kv_heads page_size"] | None, rows: Int[Array, " pages"]
    ) -> UInt8[Array, "pages kv_heads page_size"]:
        """Return rows of `k_exponent` or `v_exponent`; clamps rows past the end."""
        assert exponents is not None
        return exponents[jnp.minimum(rows, exponents.shape[0] - 1)]

    def tokens_first(self, keys: Array) -> Array:
        """Return stored keys of pages with tokens before channels."""
        return keys.swapaxes(2, 3) if self.layout.keys_transposed else keys

    @property
    def k(self) -> Array:
        """A copy of the keys as `fmt.dtype`, `[layer_pages, kv_heads, page_size, head_dim]`."""
        return as_values(self.tokens_first(self.k_bits), self.fmt)

    @property
    def v(self) -> Array:
        """A copy of the values as `fmt.dtype`, `[layer_pages, kv_heads, page_size, head_dim]`."""
        return as_values(self.v_bits, self.fmt)


@pytree
class LayerScales:
    """Static scales on the device, broadcast to `[layers, kv_heads, head_dim]`.

    Writes multiply by the inverses, which are computed once on the host, so every backend rounds
    the same numbers. `k_offset` is subtracted from keys first. Layers with dynamic scales only use
    the offset.
    """

    k: Float[Array, "layers kv_heads head_dim"]
    v: Float[Array, "layers kv_heads head_dim"]
    k_inverse: Float[Array, "layers kv_heads head_dim"]
    v_inverse: Float[Array, "layers kv_heads head_dim"]
    k_offset: Float[Array, "layers kv_heads head_dim"] | None = None

    @classmethod
    def of(cls, scales: KVScales, *, layers: int, kv_heads: int, head_dim: int) -> "LayerScales":
        """Place `scales` on the device for a model of these sizes."""

        def place(x: np.ndarray) -> Array:
            return jnp.broadcast_to(jnp.asarray(x, jnp.float32), (layers, kv_heads, head_dim))

        return cls(
            k=place(scales.k),
            v=place(scales.v),
            k_inverse=place(1 / scales.k),
            v_inverse=place(1 / scales.v),
            k_offset=None if scales.k_offset is None else place(scales.k_offset),
        )


def new_pool(
    layout: PoolLayout, *, num_pages: int, page_size: int, kv_heads: int, head_dim: int
) -> KVPool:
    """Allocate a pool of zeros with `num_pages` page numbers of `page_size` tokens each."""
    rows = layout.depth * num_pages
    key_page = (head_dim, page_size) if layout.keys_transposed else (page_size, head_dim)

    def exponents() -> Array | None:
        if not layout.exponent_depth:
            return None
        return jnp.zeros((layout.exponent_depth * num_pages, kv_heads, page_size), jnp.uint8)

    return KVPool(
        k_bits=jnp.zeros((rows, kv_heads, *key_page), layout.storage_dtype),
        v_bits=jnp.zeros((rows, kv_heads, page_size, head_dim), layout.storage_dtype),
        k_exponent=exponents(),
        v_exponent=exponents(),
        layout=layout,
    )


def page_bytes(layout: PoolLayout, *, page_size: int, kv_heads: int, head_dim: int) -> int:
    """Return the bytes of one page number: K and V in all layer slots, with exponents."""
    element_bytes = layout.depth * head_dim * layout.storage_dtype.itemsize
    return 2 * page_size * kv_heads * (element_bytes + layout.exponent_depth)


def switch_on_spec(layer: Layer, layout: PoolLayout, branch: Callable[[LayerCacheSpec], T]) -> T:
    """Return `branch(spec)` for the spec of `layer`, with one branch per spec if it is traced."""
    specs = layout.distinct
    if len(specs) == 1:
        return branch(specs[0])
    index = jnp.asarray([specs.index(spec) for spec in layout.specs], jnp.int32)[layer]
    return lax.switch(index, [functools.partial(branch, spec) for spec in specs])


class _Encoded(NamedTuple):
    """New tokens in the form in which a layer stores them.

    `k` and `v` have one array for each layer slot of the widest spec of the pool.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    k_exponent: UInt8[Array, "tokens kv_heads"] | None
    v_exponent: UInt8[Array, "tokens kv_heads"] | None


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
    """Store tokens `start .. length - 1` of one request in `layer`.

    Args:
      pages: the pool; donate it to update it in place.
      scales: the static scales; None if every layer is dynamic and has no offset.
      k, v: new keys and values; rows past `length` are padding and dropped.
      layer: the layer, may be traced.
      page_table: page numbers of the layer's group.
      start: position of the first row.
      length: tokens of the sequence, the new ones included.
    """
    layout = pages.layout
    position = start + jnp.arange(k.shape[0], dtype=jnp.int32)
    entry = jnp.minimum(position // pages.page_size, page_table.shape[0] - 1)
    number = jnp.where(position < length, page_table[entry], pages.num_pages)
    offset = position % pages.page_size
    k = k.astype(jnp.float32)
    v = v.astype(jnp.float32)
    if scales is not None and scales.k_offset is not None:
        k = k - scales.k_offset[layer]
    new = switch_on_spec(layer, layout, lambda spec: _encode(spec, layout, scales, k, v, layer))

    row = pages.rows(layer, number)
    slot_width = jnp.asarray([layout.slot_width(spec) for spec in layout.specs], jnp.int32)
    put_keys = _put_transposed if layout.keys_transposed else _put
    k_bits, v_bits = pages.k_bits, pages.v_bits
    for part, (k_part, v_part) in enumerate(zip(new.k, new.v, strict=True)):
        at = row + part * pages.num_pages
        if part:
            at = jnp.where(part < slot_width[layer], at, k_bits.shape[0])
        k_bits = put_keys(k_bits, at, offset, k_part)
        v_bits = _put(v_bits, at, offset, v_part)
    k_exponent, v_exponent = pages.k_exponent, pages.v_exponent
    if k_exponent is not None:
        assert v_exponent is not None
        assert new.k_exponent is not None and new.v_exponent is not None
        dynamic = jnp.asarray([spec.dynamic for spec in layout.specs])[layer]
        row = jnp.where(dynamic, pages.exponent_rows(layer, number), k_exponent.shape[0])
        k_exponent = _put(k_exponent, row, offset, new.k_exponent)
        v_exponent = _put(v_exponent, row, offset, new.v_exponent)
    return KVPool(k_bits, v_bits, k_exponent, v_exponent, layout=layout)


def _encode(
    spec: LayerCacheSpec,
    layout: PoolLayout,
    scales: LayerScales | None,
    k: KV,
    v: KV,
    layer: Layer,
) -> _Encoded:
    """Scale and encode float32 keys and values for a layer of this spec."""
    k_exponent = v_exponent = None
    if spec.dynamic:
        k_exponent = token_head_exponent(k, spec.fmt)
        v_exponent = token_head_exponent(v, spec.fmt)
        k = k * exponent_inverse(k_exponent)[..., None]
        v = v * exponent_inverse(v_exponent)[..., None]
    else:
        assert scales is not None, "static pages need scales"
        k = k * scales.k_inverse[layer]
        v = v * scales.v_inverse[layer]
        if layout.exponent_depth:  # all branches of the switch return the same shapes
            k_exponent = v_exponent = jnp.zeros(k.shape[:2], jnp.uint8)
    return _Encoded(
        _parts(encode(k, spec.fmt), layout),
        _parts(encode(v, spec.fmt), layout),
        k_exponent,
        v_exponent,
    )


def _parts(bits: Array, layout: PoolLayout) -> tuple[Array, ...]:
    """Return one array per layer slot, padded to the width of the widest spec."""
    parts = [bits] if bits.dtype == layout.storage_dtype else split_bytes(bits)
    width = max(layout.slot_width(spec) for spec in layout.distinct)
    return (*parts, *[jnp.zeros_like(parts[0])] * (width - len(parts)))


def fake_quant(
    spec: LayerCacheSpec, scales: LayerScales | None, k: KV, v: KV, *, layer: Layer
) -> tuple[KV, KV]:
    """Quantize and dequantize keys and values as a layer of this spec does, without a pool.

    The result equals `read` after `write`, in float32.
    """
    layout = PoolLayout.uniform(spec.fmt, 1, dynamic=spec.dynamic)
    k = k.astype(jnp.float32)
    v = v.astype(jnp.float32)
    offset = None if scales is None or scales.k_offset is None else scales.k_offset[layer]
    stored = _encode(spec, layout, scales, k if offset is None else k - offset, v, layer)
    (k_bits,), (v_bits,) = stored.k, stored.v
    if stored.k_exponent is not None and stored.v_exponent is not None:
        k_scale = exponent_scale(stored.k_exponent)[..., None]
        v_scale = exponent_scale(stored.v_exponent)[..., None]
    else:
        assert scales is not None, "static pages need scales"
        k_scale = scales.k[layer]
        v_scale = scales.v[layer]
    k = decode(k_bits, spec.fmt) * k_scale
    v = decode(v_bits, spec.fmt) * v_scale
    return (k if offset is None else k + offset), v


def read(
    pages: KVPool, scales: LayerScales | None, *, layer: Layer, page_table: Int[Array, " pages"]
) -> tuple[KV, KV]:
    """Return the float32 keys and values of one request in `layer`: all slots of its pages.

    The K offset is added back. Slots that were never written contain arbitrary values. The whole
    sequence is decoded at once, so this is for measurements and tests.
    """
    k, v = switch_on_spec(
        layer,
        pages.layout,
        lambda spec: _dequantize(pages.for_spec(spec), scales, layer, page_table),
    )
    if scales is not None and scales.k_offset is not None:
        k = k + scales.k_offset[layer]
    return k, v


def _dequantize(
    pages: KVPool, scales: LayerScales | None, layer: Layer, page_table: Int[Array, " pages"]
) -> tuple[KV, KV]:
    rows = pages.rows(layer, page_table)
    k = decode(pages.tokens_first(pages.gather(pages.k_bits, rows)), pages.fmt)
    v = decode(pages.gather(pages.v_bits, rows), pages.fmt)
    if pages.dynamic:
        rows = pages.exponent_rows(layer, page_table)
        k = k * exponent_scale(pages.gather_exponents(pages.k_exponent, rows))[..., None]
        v = v * exponent_scale(pages.gather_exponents(pages.v_exponent, rows))[..., None]
    else:
        assert scales is not None, "static pages need scales"
        k = k * scales.k[layer][:, None, :]
        v = v * scales.v[layer][:, None, :]
    return _by_token(k), _by_token(v)


def _by_token(pages: Float[Array, "pages kv_heads page_size head_dim"]) -> KV:
    """Concatenate pages along their tokens."""
    x = pages.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _scatter(
    index: Callable[[Array, Array], tuple[Any, ...]],
) -> Callable[[Array, Array, Array, Array], Array]:
    """Return `put(pool, row, offset, values)`, which sets `pool[index(row, offset)] = values`.

    Rows past the end are dropped. Under `vmap`, `put` is one scatter for all requests.
    """

    @custom_vmap
    def put(pool: Array, row: Array, offset: Array, values: Array) -> Array:
        return pool.at[index(row, offset)].set(values, mode="drop")

    @put.def_vmap
    def put_requests(
        axis_size: int, in_batched: list[bool], pool: Array, *args: Array
    ) -> tuple[Array, bool]:
        assert not in_batched[0], "the pool is shared by the requests: vmap it with in_axes=None"
        args = tuple(broadcast_unbatched(axis_size, in_batched[1:], args))
        return put(pool, *(x.reshape(-1, *x.shape[2:]) for x in args)), False

    return put


_put = _scatter(lambda row, offset: (row, slice(None), offset))
_put_transposed = _scatter(lambda row, offset: (row, slice(None), slice(None), offset))


def poison(pages: KVPool, code: int) -> KVPool:
    """Return the pool with every stored element set to `code` and every exponent to 255.

    Args:
      pages: the pool. Elements that are stored as float32 are set to NaN.
      code: `fmt.nan_code`, or 0xFF for a pool with several formats.
    """

    def fill(bits: Array) -> Array:
        return jnp.full_like(bits, jnp.nan if bits.dtype == jnp.float32 else code)

    k_exponent, v_exponent = jax.tree.map(
        lambda e: jnp.full_like(e, 255), (pages.k_exponent, pages.v_exponent)
    )
    return KVPool(
        fill(pages.k_bits), fill(pages.v_bits), k_exponent, v_exponent, layout=pages.layout
    )
