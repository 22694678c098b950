"""Cache writes by a GPU kernel, which quantizes and scatters new tokens in place in one launch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, write
from jfp8kv.core.log import warn_once
from jfp8kv.core.pytree import broadcast_unbatched
from pallas_kernels import kv_write


@dataclasses.dataclass(frozen=True)
class KernelWrite:
    """`cache.pool.write` by the kernel, bit for bit. One launch under `vmap`.

    Pools with several specs or with transposed keys are written by XLA.
    """

    interpret: bool = False

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
        """Store tokens `start .. length - 1` of one request in `layer`. See `cache.pool.write`."""
        if reason := unsupported(pages):
            warn_once(f"cache writes fall back to XLA: {reason}")
            return write(
                pages, scales, k, v, layer=layer, page_table=page_table, start=start, length=length
            )
        return self._write_requests()(k, v, page_table, start, length, pages, scales, layer)

    def _write_requests(self) -> Callable[..., KVPool]:
        """Return the write of one request, which under `vmap` is one launch for all."""

        def launch(
            k: Array,
            v: Array,
            page_table: Array,
            start: Array,
            length: Array,
            pages: KVPool,
            scales: LayerScales | None,
            layer: Layer,
        ) -> KVPool:
            static = None if pages.dynamic else scales
            assert pages.dynamic or scales is not None, "static pages need scales"
            new = kv_write(
                k,
                v,
                pages.k_bits,
                pages.v_bits,
                page_table,
                start,
                length,
                element=pages.fmt.dtype,
                layer=jnp.asarray(layer, jnp.int32),
                first_row=pages.first_rows,
                k_inverse=None if static is None else static.k_inverse,
                v_inverse=None if static is None else static.v_inverse,
                k_offset=None if scales is None else scales.k_offset,
                k_exponent=pages.k_exponent,
                v_exponent=pages.v_exponent,
                first_exponent_row=pages.first_exponent_rows if pages.dynamic else None,
                num_pages=pages.num_pages,
                interpret=self.interpret,
            )
            return KVPool(*new, layout=pages.layout)

        @custom_vmap
        def one(
            k: Array, v: Array, page_table: Array, start: Array, length: Array, *shared: Any
        ) -> KVPool:
            return launch(k[None], v[None], page_table[None], start[None], length[None], *shared)

        @one.def_vmap
        def many(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[KVPool, Any]:
            assert not any(jax.tree.leaves(in_batched[5:])), (
                "requests share the pool and the layer: vmap with in_axes=None"
            )
            k, v, page_table, start, length = broadcast_unbatched(
                axis_size, in_batched[:5], args[:5]
            )
            pages = launch(k, v, page_table, start, length, *args[5:])
            return pages, jax.tree.map(lambda _: False, pages)

        return one


def unsupported(pages: KVPool) -> str | None:
    """Return the reason why the kernel cannot write to this pool; None if it can."""
    if len(pages.layout.distinct) > 1:
        return "the layers have several formats, and the kernel writes one."
    if pages.layout.keys_transposed:
        return "the keys are transposed, and the kernel writes tokens before channels."
    return None
