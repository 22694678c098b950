"""A model whose layers keep their keys and values in any of several ways, as data: one compiled program tries them all.

The cache itself is float32. Each layer's keys and values go through the one quantizer and back before they are written, in the
way that an array says: what attention sees is what the real cache would give it, to the rounding of float32.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jfp8kv.attention.interface import Query, paged_attend
from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, fake_quant
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import FLOAT32
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.batch import ForwardBatch
from jfp8kv.engine.step import Chunk, StepModel, Weights, each_request
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import bind

UNQUANTIZED = LayerCacheSpec(FLOAT32)


@pytree
class SimulatedLayers:
    """How each layer keeps its keys and values: an index into the kinds that the program knows, and scales."""

    kind: Int[Array | np.ndarray, " layers"]
    scales: LayerScales

    @classmethod
    def of(
        cls,
        kinds: Sequence[LayerCacheSpec],
        known: Sequence[LayerCacheSpec],
        scales: KVScales,
        config: ModelConfig,
    ) -> "SimulatedLayers":
        index = np.array([known.index(kind) for kind in kinds], np.int32)
        c = config
        return cls(
            index, LayerScales.of(scales, layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim)
        )


def simulated(
    model: StepModel,
    weights: Weights,
    ways: SimulatedLayers,
    batch: ForwardBatch,
    pages: KVPool,
    *,
    known: tuple[LayerCacheSpec, ...],
) -> tuple[Float[Array, "requests tokens vocab"], KVPool]:
    """The logits after each token of a chunk of each request: a step over a float32 cache, see engine/step.py."""
    c, decoder = model.config, bind(model.config, weights, model.dtype)
    unit = LayerScales.of(
        KVScales.unit(c.layers), layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim
    )

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        cached = paged_attend(
            model.attention, unit, model.options(decoder), chunk.metadata(model.groups)
        )

        def attend(layer: Layer, q: Query, k: KV, v: KV, pages: KVPool) -> tuple[Query, KVPool]:
            def kept(kind: LayerCacheSpec) -> tuple[KV, KV]:
                if kind == UNQUANTIZED:
                    return k.astype(jnp.float32), v.astype(jnp.float32)
                return fake_quant(kind, ways.scales, k, v, layer=layer)

            branches: Any = [lambda kind=kind: kept(kind) for kind in known]
            return cached(layer, q, *lax.switch(ways.kind[layer], branches), pages)

        positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
        hidden, pages = decoder(
            chunk.tokens, positions, attend=attend, carry=pages, context=chunk.context
        )
        return decoder.logits(hidden), pages

    return each_request(one, batch, pages, out_axes=(0, None))
