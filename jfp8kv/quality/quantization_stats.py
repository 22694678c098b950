"""Quantization error: a scoring step with an `attend` that reads the cache back.

Nothing is simulated. Attention writes keys and values, `read` decodes the stored values
(cache/pool.py), and the two are compared. With K offsets, keys minus the offset are compared:
their rounding, clipping and flushing are those of the keys.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from jfp8kv.attention.interface import AttentionMetadata, paged_attend
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, read
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.batch import ForwardBatch
from jfp8kv.engine.step import Chunk, StepModel, Weights, each_request
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import bind
from jfp8kv.quality.observe import Update, observe
from jfp8kv.quality.observers import Block, HistogramObserver, ScaleShape, Valid

# Two float32 roundings: the value times the inverse scale, and the code times the scale.
ROUNDING = 2.0**-22
Sums = Float32[Array, "layers kinds kv_heads"]
Counts = Int32[Array, "layers kinds kv_heads"]


@pytree
class QuantStats:
    """Sums over the values of each layer, kind (K, V) and KV head.

    Attributes:
      signal: sum of squared values. With K offsets these are whole keys too, so that the
        signal-to-noise ratios of two caches can be compared.
      noise: sum of squared errors.
      clipped: number of values that are larger than the largest representable one.
      flushed: number of nonzero values that are stored as zero.
    """

    signal: Sums
    noise: Sums
    clipped: Counts
    flushed: Counts

    @classmethod
    def empty(cls, config: ModelConfig) -> "QuantStats":
        """Return the statistics of no values."""
        shape = (config.layers, 2, config.kv_heads)
        sums = jnp.zeros(shape, jnp.float32)
        counts = jnp.zeros(shape, jnp.int32)
        return cls(sums, sums, counts, counts)

    def update(
        self, layer: Layer, given: Block, target: Block, stored: Block, largest: Array, valid: Valid
    ) -> "QuantStats":
        """Return the statistics with the keys and values of `layer`, all float32.

        Args:
          layer: the layer.
          given: the keys and values of the model.
          target: the values to store: `given` minus the K offset.
          stored: the values that the cache returns.
          largest: see `largest_representable`.
          valid: false for padding tokens.
        """
        larger = jnp.abs(target) > jnp.abs(stored) * (1 + ROUNDING)
        clipped = larger & (jnp.abs(stored) >= largest[:, None])
        flushed = (target != 0) & (stored == 0)

        def added(total: Array, values: Array) -> Array:
            counted = jnp.where(valid[:, None, None], values, jnp.zeros_like(values))
            return total.at[layer].add(jnp.sum(counted, axis=(1, 3), dtype=total.dtype))

        return QuantStats(
            added(self.signal, given**2),
            added(self.noise, (target - stored) ** 2),
            added(self.clipped, clipped.astype(jnp.int32)),
            added(self.flushed, flushed.astype(jnp.int32)),
        )


@pytree
class CacheStats:
    """The quantization error of a chunk, and optionally a histogram of its magnitudes."""

    quantization: QuantStats
    magnitudes: HistogramObserver | None

    @classmethod
    def empty(cls, config: ModelConfig, *, magnitudes: bool) -> "CacheStats":
        """Return the statistics of no values."""
        shape = ScaleShape(config.layers, config.kv_heads, config.head_dim, "tensor")
        histogram = HistogramObserver.empty(shape) if magnitudes else None
        return cls(QuantStats.empty(config), histogram)


def score_with_stats(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: ForwardBatch,
    pages: KVPool,
    *,
    magnitudes: bool = False,
) -> tuple[tuple[Float[Array, "requests tokens vocab"], CacheStats], KVPool]:
    """Return the result of `engine.step.logits`, and the statistics of each request."""
    decoder = bind(model.config, weights, model.dtype)

    def one(chunk: Chunk, pages: KVPool) -> tuple[tuple[Array, CacheStats], KVPool]:
        metadata = chunk.metadata(model.groups)
        positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
        attend = observe(
            paged_attend(model.attention, scales, model.options(decoder), metadata),
            quantization_update(scales, metadata, positions < chunk.length),
        )
        carry = (pages, CacheStats.empty(model.config, magnitudes=magnitudes))
        hidden, (pages, stats) = decoder(
            chunk.tokens, positions, attend=attend, carry=carry, context=chunk.context
        )
        return (decoder.logits(hidden), stats), pages

    scored: tuple[tuple[Array, CacheStats], KVPool] = each_request(
        one, batch, pages, out_axes=(0, None)
    )
    return scored


def quantization_update(
    scales: LayerScales | None, metadata: Callable[[Layer], AttentionMetadata], valid: Valid
) -> Update[CacheStats]:
    """Return an `update` for `observe` that compares keys and values with the stored ones."""
    offset = None if scales is None else scales.k_offset
    without_offset = None if scales is None else dataclasses.replace(scales, k_offset=None)

    def update(stats: CacheStats, layer: Layer, k: KV, v: KV, pages: KVPool) -> CacheStats:
        given = jnp.stack([k, v]).astype(jnp.float32)
        target = given if offset is None else given.at[0].add(-offset[layer])
        stored = read_back(pages, without_offset, metadata(layer), tokens=k.shape[0], layer=layer)
        largest = largest_representable(pages, scales, layer)
        quantization = stats.quantization.update(layer, given, target, stored, largest, valid)
        histogram = stats.magnitudes
        if histogram is not None:
            histogram = histogram.update(layer, given, valid)
        return CacheStats(quantization, histogram)

    return update


def read_back(
    pages: KVPool, scales: LayerScales | None, at: AttentionMetadata, *, tokens: int, layer: Layer
) -> Block:
    """Return the stored keys and values of `tokens` positions from `at.start`, float32.

    Only the pages of those positions are decoded.
    """
    size = pages.page_size
    count = min((tokens - 1) // size + 2, at.page_table.shape[0])
    first = jnp.minimum(at.start // size, at.page_table.shape[0] - count)
    table: Int[Array, " pages"] = lax.dynamic_slice(at.page_table, (first,), (count,))
    slot = at.start - first * size + jnp.arange(tokens, dtype=jnp.int32)
    slot = jnp.minimum(slot, count * size - 1)
    k, v = read(pages, scales, layer=layer, page_table=table)
    return jnp.stack([k[slot], v[slot]])


def largest_representable(
    pages: KVPool, scales: LayerScales | None, layer: Layer
) -> Float[Array, "2 heads channels"]:
    """Return the largest magnitudes that `layer` can store; infinite with dynamic scales."""
    by_layer = [jnp.inf if spec.dynamic else spec.fmt.largest for spec in pages.layout.specs]
    largest = jnp.asarray(by_layer, jnp.float32)[layer]
    if scales is None:
        return jnp.full((2, 1, 1), largest)
    return largest * jnp.stack([scales.k[layer], scales.v[layer]])
