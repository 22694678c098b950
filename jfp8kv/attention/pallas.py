"""Attention by the GPU kernels.

The kernels take a batch of requests. So `vmap` over requests calls a kernel once (`custom_vmap`):
the chunks of a batch are concatenated, padding included, and the kernel receives the number of real
queries of each request. The kernels are arguments, which `dispatch` passes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jfp8kv.attention import xla
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions, Query, score_offset
from jfp8kv.cache.pool import KVPool, Layer, LayerScales
from jfp8kv.core.log import warn_once
from jfp8kv.core.pytree import broadcast_unbatched
from pallas_kernels.kernel_inputs import LayerView


@dataclasses.dataclass(frozen=True)
class PallasAttention:
    """Paged attention by kernels. Layers with byte-split elements use `xla`.

    Attributes:
      decode: `pallas_kernels.paged_decode`.
      prefill: `pallas_kernels.paged_prefill`.
      capability: compute capability of the GPU.
      interpret: run the kernels in interpret mode.
    """

    decode: Callable[..., Array]
    prefill: Callable[..., Array]
    capability: tuple[int, int]
    interpret: bool

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
        """Return `softmax(q k^T) v` for one request; rows that see no key give zeros."""
        if pages.byte_split:
            warn_once(
                f"attention of {pages.fmt.name} layers falls back to XLA: the kernels do not read "
                "byte-split elements"
            )
            return xla.attention(q, pages, scales, options, metadata, layer=layer)
        return self._attend_requests()(
            q,
            metadata.page_table,
            metadata.start,
            metadata.length,
            pages,
            scales,
            options,
            jnp.asarray(layer, jnp.int32),
        )

    def _attend_requests(self) -> Callable[..., Array]:
        """Return the attention of one request, which under `vmap` is one kernel call for all."""

        @custom_vmap
        def one(q: Array, page_table: Array, start: Array, length: Array, *shared: Any) -> Array:
            return self._batch(q[None], page_table[None], start[None], length[None], *shared)[0]

        @one.def_vmap
        def many(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Array, bool]:
            assert not any(jax.tree.leaves(in_batched[4:])), (
                "requests share the pool and the layer: vmap with in_axes=None"
            )
            q, page_table, start, length = broadcast_unbatched(axis_size, in_batched[:4], args[:4])
            return self._batch(q, page_table, start, length, *args[4:]), True

        return one

    def _batch(
        self,
        q: Array,
        page_table: Array,
        start: Array,
        length: Array,
        pages: KVPool,
        scales: LayerScales | None,
        options: AttentionOptions,
        layer: Array,
    ) -> Array:
        """Return the outputs of a batch of requests, `[requests, tokens, q_heads, head_dim]`."""
        requests, tokens, q_heads, head_dim = q.shape
        flat = q.reshape(-1, q_heads, head_dim)
        static = None if pages.dynamic else scales
        assert pages.dynamic or scales is not None, "static pages need scales"
        view = LayerView(
            pages.k_bits,
            pages.v_bits,
            layer=layer,
            first_row=pages.first_rows,
            k_scale=None if static is None else static.k,
            v_scale=None if static is None else static.v,
            k_exponent=pages.k_exponent,
            v_exponent=pages.v_exponent,
            first_exponent_row=pages.first_exponent_rows if pages.dynamic else None,
            window=options.window,
            sinks=options.sinks,
        )
        attend = functools.partial(
            self.decode if tokens == 1 else self.prefill,
            element=pages.fmt.dtype,
            score_offset=score_offset(flat, scales, options, layer),
            sm_scale=options.sm_scale,
            softcap=options.softcap,
            capability=self.capability,
            interpret=self.interpret,
        )
        queries = jnp.clip(length - start, 0, tokens)
        length = jnp.where(queries > 0, start + queries, 0)
        if tokens == 1:
            out = attend(flat, view, page_table, length)
        else:
            first = jnp.arange(requests, dtype=jnp.int32) * tokens
            out = attend(flat, view, page_table, length, first, queries)
        return out.reshape(q.shape)
