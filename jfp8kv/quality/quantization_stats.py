"""The step that is measured: the engine's own, with an `attend` that reads back what the cache has stored.

Nothing is simulated: keys and values are written by the attention's own write, read by its inverse (cache/pool.py), and
compared with those the model gave. Where keys are stored less an offset, it is what is left of them that is compared: what
rounding, clipping and zeros do to that is what they do to the keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from jfp8kv.attention.interface import Attend, AttentionMetadata, Query, paged_attend
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, read
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.batch import ForwardBatch
from jfp8kv.engine.step import Chunk, StepModel, Weights, each_request
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import bind
from jfp8kv.quality.observers import Block, HistogramObserver, Real, ScaleShape

ROUNDING = (
    2.0**-22
)  # of float32, twice: a scale's inverse, its product with a value, and that of the scale with what is stored
Sums = Float32[Array, "layers kinds kv_heads"]
Counts = Int32[Array, "layers kinds kv_heads"]


@pytree
class QuantStats:
    """Sums over the values of each layer, K then V, and KV head: of squares, of squared errors, and how many values were
    clipped (stored as the largest there is, although they are larger) or flushed (stored as zero, although they are not).

    Squares are those of whole keys, whatever offset they are stored less, so that ratios of two caches can be compared.
    """

    signal: Sums
    noise: Sums
    clipped: Counts
    flushed: Counts

    @classmethod
    def empty(cls, config: ModelConfig) -> "QuantStats":
        shape = config.layers, 2, config.kv_heads
        return cls(
            *(jnp.zeros(shape, jnp.float32) for _ in range(2)),
            *(jnp.zeros(shape, jnp.int32) for _ in range(2)),
        )

    def update(
        self, layer: Layer, given: Block, meant: Block, stored: Block, largest: Array, real: Real
    ) -> "QuantStats":
        """With the keys and values of `layer` as they were given, as they were to be stored and as they were stored, all
        float32; see `largest_held`."""
        real = real[:, None, None]
        larger = jnp.abs(meant) > jnp.abs(stored) * (1 + ROUNDING)
        clipped = larger & (jnp.abs(stored) >= largest[:, None])
        flushed = (meant != 0) & (stored == 0)

        def added(to: Array, values: Array) -> Array:
            return to.at[layer].add(
                jnp.sum(
                    jnp.where(real, values, jnp.zeros_like(values)), axis=(1, 3), dtype=to.dtype
                )
            )

        return QuantStats(
            added(self.signal, given**2),
            added(self.noise, (meant - stored) ** 2),
            added(self.clipped, clipped.astype(jnp.int32)),
            added(self.flushed, flushed.astype(jnp.int32)),
        )


@pytree
class Seen:
    """What a pass has seen: how well the cache kept keys and values, and which magnitudes they had, if that was asked for."""

    fidelity: QuantStats
    magnitudes: HistogramObserver | None

    @classmethod
    def empty(cls, config: ModelConfig, *, magnitudes: bool) -> "Seen":
        units = ScaleShape(config.layers, config.kv_heads, config.head_dim, "tensor")
        return cls(QuantStats.empty(config), HistogramObserver.empty(units) if magnitudes else None)

    def update(
        self, layer: Layer, given: Block, meant: Block, stored: Block, largest: Array, real: Real
    ) -> "Seen":
        fidelity = self.fidelity.update(layer, given, meant, stored, largest, real)
        return Seen(
            fidelity,
            None if self.magnitudes is None else self.magnitudes.update(layer, given, real),
        )


def watched(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: ForwardBatch,
    pages: KVPool,
    *,
    magnitudes: bool = False,
) -> tuple[tuple[Float[Array, "requests tokens vocab"], Seen], KVPool]:
    """`engine.step.logits`, and what was seen of each request's keys and values."""
    decoder = bind(model.config, weights, model.dtype)

    def one(chunk: Chunk, pages: KVPool) -> tuple[tuple[Array, Seen], KVPool]:
        metadata = chunk.metadata(model.groups)
        positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
        attend = paged_attend(model.attention, scales, model.options(decoder), metadata)
        attend = observing(attend, scales, metadata, positions < chunk.length)
        carry = pages, Seen.empty(model.config, magnitudes=magnitudes)
        hidden, (pages, seen) = decoder(
            chunk.tokens, positions, attend=attend, carry=carry, context=chunk.context
        )
        return (decoder.logits(hidden), seen), pages

    return each_request(one, batch, pages, out_axes=((0, 0), None))


def observing(
    attend: Attend,
    scales: LayerScales | None,
    metadata: Callable[[Layer], AttentionMetadata],
    real: Real,
) -> Callable[..., Any]:
    """`attend` that also compares the keys and values it is given with what the cache has of them afterwards."""

    offset = None if scales is None else scales.k_offset
    less = scales if offset is None else dataclasses.replace(scales, k_offset=None)

    def seeing(
        layer: Layer, q: Query, k: KV, v: KV, carry: tuple[KVPool, Seen]
    ) -> tuple[Query, tuple[KVPool, Seen]]:
        pages, seen = carry
        out, pages = attend(layer, q, k, v, pages)
        given = jnp.stack([k, v]).astype(jnp.float32)
        meant = given if offset is None else given.at[0].add(-offset[layer])
        stored = written(pages, less, metadata(layer), tokens=k.shape[0], layer=layer)
        return out, (
            pages,
            seen.update(layer, given, meant, stored, largest_held(pages, scales, layer), real),
        )

    return seeing


def written(
    pages: KVPool, scales: LayerScales | None, at: AttentionMetadata, *, tokens: int, layer: Layer
) -> Block:
    """What the cache has for the `tokens` positions from `at.start` on, float32; only the pages they lie in are decoded."""
    size = pages.page_size
    count = min((tokens - 1) // size + 2, at.page_table.shape[0])
    first = jnp.minimum(at.start // size, at.page_table.shape[0] - count)
    table: Int[Array, " pages"] = lax.dynamic_slice(at.page_table, (first,), (count,))
    slot = jnp.minimum(
        at.start - first * size + jnp.arange(tokens, dtype=jnp.int32), count * size - 1
    )
    return jnp.stack([x[slot] for x in read(pages, scales, layer=layer, page_table=table)])


def largest_held(
    pages: KVPool, scales: LayerScales | None, layer: Layer
) -> Float[Array, "2 heads channels"]:
    """The largest magnitudes that `layer` can store of K and V; infinite where each token brings a scale that fits it."""
    kinds = pages.layout.specs
    largest = jnp.asarray(
        [jnp.inf if kind.dynamic else kind.fmt.largest for kind in kinds], jnp.float32
    )[layer]
    if scales is None:
        return jnp.full((2, 1, 1), largest)
    return largest * jnp.stack([scales.k[layer], scales.v[layer]])
