"""The device side of the cache: one pool of pages, whose page axis folds the layers.

Page `p` of layer `l` is row `l * num_pages + p`, so a `lax.scan` over layers carries the whole pool and no layer is ever sliced
out of it; where windows put layers into groups (cache/groups.py), the layer's slot in its group stands for `l`. A token's place
is (page, offset). A page holds values as `[kv_heads, page_size, head_dim]` and keys transposed, as `[kv_heads, head_dim,
page_size]`: both products of attention then run along rows, `q k^T` over tokens and `p v` over channels, which a CPU does twice
as fast (docs/log.md). A key is written with a stride, once; it is read once per token to come.

Everything here is written for one request. Under `vmap` over requests the pool itself stays one array: the writes of all
requests become one scatter into it (`custom_vmap`), in place when the caller donates it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, UInt8

from jfp8kv.cache.scales import KVScales, exponent_inverse, exponent_scale, token_head_exponent
from jfp8kv.core.formats import KVFormat, as_values, decode, encode
from jfp8kv.core.pytree import pytree, static


@pytree
class KVPages:
    """Keys and values of every layer. `real = stored * scale`.

    `k_bits` and `v_bits` hold the format's bits (core/formats.py says why), keys transposed; `k` and `v` show them as `float8`,
    both with tokens before channels. The exponents are there for dynamic scales alone, else None.
    """

    k_bits: Array  # stored bits [layer_pages, kv_heads, head_dim, page_size]
    v_bits: Array  # stored bits [layer_pages, kv_heads, page_size, head_dim]
    k_exponent: UInt8[Array, "layer_pages kv_heads page_size"] | None
    v_exponent: UInt8[Array, "layer_pages kv_heads page_size"] | None
    fmt: KVFormat = static()
    depth: int = static()  # layers that share a page number
    slots: tuple[int, ...] = static(default=())  # by layer, its place among those; () is the layer's own index

    @property
    def num_pages(self) -> int:
        """Page numbers there are, each a page in `depth` layers."""
        return self.k_bits.shape[0] // self.depth

    def rows(self, layer: Int[Array, ""] | int, numbers: Int[Array, " pages"]) -> Int[Array, " pages"]:
        """Rows of the pool for page numbers of `layer`; numbers past the end give rows past the end."""
        slot = jnp.asarray(self.slots, jnp.int32)[layer] if self.slots else jnp.int32(layer)
        return jnp.where(numbers < self.num_pages, slot * self.num_pages + numbers, self.k_bits.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.v_bits.shape[2]

    @property
    def dynamic(self) -> bool:
        """Whether scales are stored in the pages."""
        return self.k_exponent is not None

    @property
    def k(self) -> Array:
        """The keys as `fmt.dtype` (`float8_e4m3fn`, ...), `[layer_pages, kv_heads, page_size, head_dim]`. A copy."""
        return as_values(self.k_bits.swapaxes(2, 3), self.fmt)

    @property
    def v(self) -> Array:
        """The values as `fmt.dtype`, of the same shape. A copy."""
        return as_values(self.v_bits, self.fmt)


@pytree
class LayerScales:
    """Static scales broadcast to `[layers, kv_heads, head_dim]`, with inverses taken once on the host.

    Writing multiplies by the inverse, so every backend rounds the same product.
    """

    k: Float[Array, "layers kv_heads head_dim"]
    v: Float[Array, "layers kv_heads head_dim"]
    k_inverse: Float[Array, "layers kv_heads head_dim"]
    v_inverse: Float[Array, "layers kv_heads head_dim"]

    @classmethod
    def of(cls, scales: KVScales, *, layers: int, kv_heads: int, head_dim: int) -> "LayerScales":
        full = (layers, kv_heads, head_dim)
        values = (scales.k, scales.v, 1 / scales.k, 1 / scales.v)
        return cls(*(jnp.broadcast_to(jnp.asarray(x, jnp.float32), full) for x in values))


def new_pages(
    fmt: KVFormat,
    *,
    depth: int,
    num_pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dynamic: bool = False,
    slots: tuple[int, ...] = (),
) -> KVPages:
    """A pool of zeros: `num_pages` pages in each of `depth` layers, of `page_size` tokens; `dynamic` adds the exponents."""
    heads = (depth * num_pages, kv_heads)
    k_bits = jnp.zeros((*heads, head_dim, page_size), fmt.stored)
    v_bits = jnp.zeros((*heads, page_size, head_dim), fmt.stored)
    exponent = [jnp.zeros((*heads, page_size), jnp.uint8) if dynamic else None for _ in "kv"]
    return KVPages(k_bits, v_bits, *exponent, fmt=fmt, depth=depth, slots=slots)


def page_bytes(fmt: KVFormat, *, depth: int, page_size: int, kv_heads: int, head_dim: int, dynamic: bool = False) -> int:
    """Bytes one page number takes in all its layers, K and V, exponents included."""
    return 2 * depth * page_size * kv_heads * (head_dim * fmt.itemsize + int(dynamic))


def write(
    pages: KVPages,
    scales: LayerScales | None,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    *,
    layer: Int[Array, ""] | int,
    page_table: Int[Array, " pages"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> KVPages:
    """Store tokens `start .. length-1` of one request in `layer`; rows of `k` and `v` past `length` are padding, dropped.

    `scales` are the static ones, or None when `pages.dynamic`: then each token and head is scaled by its own power of two.
    """
    tokens = k.shape[0]
    position = start + jnp.arange(tokens, dtype=jnp.int32)
    entry = jnp.minimum(position // pages.page_size, page_table.shape[0] - 1)
    row = jnp.where(position < length, pages.rows(layer, page_table[entry]), pages.k_bits.shape[0])
    offset = position % pages.page_size

    if pages.dynamic:
        k_exponent, v_exponent = (token_head_exponent(x.astype(jnp.float32), pages.fmt) for x in (k, v))
        k_factor, v_factor = (exponent_inverse(e)[..., None] for e in (k_exponent, v_exponent))
        exponents = (
            _put(pages.k_exponent, row, offset, k_exponent),
            _put(pages.v_exponent, row, offset, v_exponent),
        )
    else:
        assert scales is not None, "static pages need scales"
        k_factor, v_factor = scales.k_inverse[layer], scales.v_inverse[layer]
        exponents = None, None
    k_bits = _put_keys(pages.k_bits, row, offset, encode(k.astype(jnp.float32) * k_factor, pages.fmt))
    v_bits = _put(pages.v_bits, row, offset, encode(v.astype(jnp.float32) * v_factor, pages.fmt))
    return KVPages(k_bits, v_bits, *exponents, fmt=pages.fmt, depth=pages.depth, slots=pages.slots)


KV = Float[Array, "tokens kv_heads head_dim"]


def read(
    pages: KVPages, scales: LayerScales | None, *, layer: Int[Array, ""] | int, page_table: Int[Array, " pages"]
) -> tuple[KV, KV]:
    """Keys and values of one request in `layer`, real ones, float32: every slot of its pages, in the order of its tokens.

    What `write` stored comes back as it is there; slots never written hold anything. The whole text is decoded at once: for
    measuring and for oracles.
    """
    rows = jnp.minimum(pages.rows(layer, page_table), pages.k_bits.shape[0] - 1)

    def real(bits: Array, exponent: Array | None, scale: Array | None) -> KV:
        values = decode(bits, pages.fmt)  # [pages, kv_heads, page_size, head_dim]
        if exponent is not None:
            values = values * exponent_scale(exponent[rows])[..., None]
        values = values.swapaxes(1, 2).reshape(-1, bits.shape[1], bits.shape[3])
        return values if scale is None else values * scale[layer]

    k = real(pages.k_bits[rows].swapaxes(2, 3), pages.k_exponent, None if scales is None else scales.k)
    return k, real(pages.v_bits[rows], pages.v_exponent, None if scales is None else scales.v)


def _scatter(place: Callable[[Array, Array], tuple]) -> Callable[[Array, Array, Array, Array], Array]:
    """`pool[place(row, offset)] = values`, rows past the end dropped; under `vmap` one scatter for all requests."""

    @custom_vmap
    def scatter(pool: Array, row: Array, offset: Array, values: Array) -> Array:
        return pool.at[place(row, offset)].set(values, mode="drop")

    @scatter.def_vmap
    def requests(axis_size: int, in_batched: list[bool], pool: Array, *args: Array) -> tuple[Array, bool]:
        """The requests' tokens, one after another, into the one pool they share."""
        assert not in_batched[0], "the pool is shared by the requests: vmap it with in_axes=None"
        flat = []
        for x, batched in zip(args, in_batched[1:], strict=True):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            flat.append(x.reshape(-1, *x.shape[2:]))
        return scatter(pool, *flat), False

    return scatter


_put = _scatter(lambda row, offset: (row, slice(None), offset))
_put_keys = _scatter(lambda row, offset: (row, slice(None), slice(None), offset))


def fill(pages: KVPages, code: int) -> KVPages:
    """The pool with every stored byte or word set to `code` (`fmt.nan_code` poisons it), exponents to all ones."""
    bits = jax.tree.map(lambda x: jnp.full_like(x, code if x.dtype != jnp.float32 else jnp.nan), (pages.k_bits, pages.v_bits))
    exponents = [None if e is None else jnp.full_like(e, 255) for e in (pages.k_exponent, pages.v_exponent)]
    return KVPages(*bits, *exponents, fmt=pages.fmt, depth=pages.depth, slots=pages.slots)
