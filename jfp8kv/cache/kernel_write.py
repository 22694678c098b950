"""`write` of cache/pool.py by the GPU kernel: quantized and scattered in one launch, in place.

Pools that the kernel does not know (layers of several kinds, keys transposed) are left to `write`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, write
from jfp8kv.core.batching import with_axis
from pallas_kernels import kv_write


@dataclasses.dataclass(frozen=True)
class KernelWrite:
    """Stores tokens as `write` does, bit for bit; under `vmap` over requests as one kernel for all."""

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
        """Store tokens `start .. length-1` of one request in `layer`; rows past `length` are padding, dropped."""
        if len(pages.layout.distinct) > 1 or pages.layout.keys_transposed:
            return write(
                pages, scales, k, v, layer=layer, page_table=page_table, start=start, length=length
            )
        of_layer: dict[str, Any] = {
            "layer": jnp.asarray(layer, jnp.int32),
            "first_row": pages.first_rows,
        }
        if pages.dynamic:
            of_layer["first_exponent_row"] = pages.first_exponent_rows
        else:
            assert scales is not None, "static pages need scales"
            of_layer |= {"k_inverse": scales.k_inverse, "v_inverse": scales.v_inverse}
        if scales is not None:
            of_layer["k_offset"] = scales.k_offset
        return self._requests()(k, v, page_table, start, length, pages, of_layer)

    def _requests(self) -> Any:
        def batch(
            k: Array,
            v: Array,
            page_table: Array,
            start: Array,
            length: Array,
            pages: KVPool,
            of_layer: dict[str, Any],
        ) -> KVPool:
            new = kv_write(
                k,
                v,
                pages.k_bits,
                pages.v_bits,
                page_table,
                start,
                length,
                element=pages.fmt.dtype,
                k_exponent=pages.k_exponent,
                v_exponent=pages.v_exponent,
                num_pages=pages.num_pages,
                interpret=self.interpret,
                **of_layer,
            )
            return KVPool(*new, layout=pages.layout)

        @custom_vmap
        def one(
            k: Array, v: Array, page_table: Array, start: Array, length: Array, *shared: Any
        ) -> KVPool:
            return batch(*(x[None] for x in (k, v, page_table, start, length)), *shared)

        @one.def_vmap
        def many(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[KVPool, Any]:
            own, shared = args[:5], args[5:]
            assert not any(jax.tree.leaves(in_batched[5:])), (
                "requests share the pool and the layer: vmap with in_axes=None"
            )
            pages = batch(*with_axis(axis_size, in_batched[:5], own), *shared)
            return pages, jax.tree.map(lambda _: False, pages)

        return one
