"""Attention by the GPU kernels: from one request and a pool of pages to what a kernel takes.

The kernels take a batch of requests. `vmap` over requests therefore reaches them as one call (`custom_vmap`), not as a loop or
a larger grid: a batch's chunks lie one after another, padding between them, and each request says how many of its queries are
real. Kernels are handed in by dispatch, which alone knows them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jfp8kv.attention import xla
from jfp8kv.attention.interface import (
    AttentionMetadata,
    AttentionOptions,
    KVPool,
    Layer,
    LayerScales,
    Query,
)
from jfp8kv.core.batching import with_axis

Shared = dict[str, Any]  # by the kernels' names


@dataclasses.dataclass(frozen=True)
class PallasAttention:
    """Paged attention by these kernels. Layers whose elements lie in byte planes are left to `xla`."""

    decode: Callable[..., Array]
    prefill: Callable[..., Array]
    capability: tuple[int, int]  # of the GPU
    interpret: bool

    def __call__(
        self,
        q: Query,
        pages: KVPool,
        scales: LayerScales | None,
        options: AttentionOptions,
        at: AttentionMetadata,
        *,
        layer: Layer,
    ) -> Query:
        """`softmax(q k^T) v` for one request; rows that see no key give zeros, and so does padding."""
        if in_planes(pages):
            return xla.attention(q, pages, scales, options, at, layer=layer)
        shared = self._shared(pages, scales, options, layer)
        return self._requests(pages, options)(q, at.page_table, at.start, at.length, shared)

    def _shared(
        self, pages: KVPool, scales: LayerScales | None, options: AttentionOptions, layer: Layer
    ) -> Shared:
        """What all requests of a batch share."""
        shared = {
            "k_pages": pages.k_bits,
            "v_pages": pages.v_bits,
            "layer": jnp.asarray(layer, jnp.int32),
            "first_row": pages.first_rows,
            "window": options.window,
            "sinks": options.sinks,
        }
        if pages.dynamic:
            shared |= {
                "k_exponent": pages.k_exponent,
                "v_exponent": pages.v_exponent,
                "first_exponent_row": pages.first_exponent_rows,
            }
        else:
            assert scales is not None, "static pages need scales"
            shared |= {"k_scale": scales.k, "v_scale": scales.v}
        if (
            scales is not None
            and scales.k_offset is not None
            and (options.softcap is not None or options.sinks is not None)
        ):
            shared["k_offset"] = scales.k_offset[layer]
        return shared

    def _requests(self, pages: KVPool, options: AttentionOptions) -> Callable[..., Array]:
        """One request's attention; under `vmap` one kernel for all."""

        def batch(
            q: Array, page_table: Array, start: Array, length: Array, shared: Shared
        ) -> Array:
            shared = dict(shared)
            requests, tokens, q_heads, head_dim = q.shape
            flat = q.reshape(-1, q_heads, head_dim)
            more = {
                "element": pages.fmt.dtype,
                "sm_scale": options.sm_scale,
                "softcap": options.softcap,
                "capability": self.capability,
                "interpret": self.interpret,
                "score_offset": _score_offset(flat, shared.pop("k_offset", None), options),
            }
            k_pages, v_pages = shared.pop("k_pages"), shared.pop("v_pages")
            queries = jnp.clip(length - start, 0, tokens)
            length = jnp.where(queries > 0, start + queries, 0)
            if tokens == 1:
                out = self.decode(flat, k_pages, v_pages, page_table, length, **shared, **more)
            else:
                first = jnp.arange(requests, dtype=jnp.int32) * tokens
                out = self.prefill(
                    flat, k_pages, v_pages, page_table, length, first, queries, **shared, **more
                )
            return out.reshape(q.shape)

        @custom_vmap
        def one(q: Array, page_table: Array, start: Array, length: Array, shared: Shared) -> Array:
            return batch(q[None], page_table[None], start[None], length[None], shared)[0]

        @one.def_vmap
        def many(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Array, bool]:
            *own, shared = args
            assert not any(jax.tree.leaves(in_batched[-1])), (
                "requests share the pool and the layer: vmap with in_axes=None"
            )
            return batch(*with_axis(axis_size, in_batched[:-1], own), shared), True

        return one


def in_planes(pages: KVPool) -> bool:
    """Whether an element's bytes lie apart, which kernels do not put together."""
    return pages.fmt.stored.itemsize > pages.k_bits.dtype.itemsize


def _score_offset(q: Array, k_offset: Array | None, options: AttentionOptions) -> Array | None:
    """What the K offset adds to each query's scores, `[queries, q_heads]` float32: seen by a cap or a sink alone."""
    if k_offset is None:
        return None
    kv_heads, head_dim = k_offset.shape
    grouped = q.astype(jnp.float32).reshape(q.shape[0], kv_heads, -1, head_dim)
    return (
        jnp.einsum("thgd,hd->thg", grouped, k_offset, precision="highest").reshape(q.shape[:2])
        * options.sm_scale
    )
