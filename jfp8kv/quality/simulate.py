"""A simulated quantized cache. Layer formats are data, so one program runs all plans.

The cache is float32. The keys and values of each layer are quantized and dequantized before they
are written, in the format that `SimulatedLayers` selects. Attention reads the same values as from a
real cache, up to rounding in float32.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jfp8kv.attention.interface import Attend, Query, paged_attend
from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, fake_quant
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import FLOAT32
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.batch import ForwardBatch
from jfp8kv.engine.step import Chunk, StepModel, Weights, each_request
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import bind
from jfp8kv.quality.observe import unit_scales

UNQUANTIZED = LayerCacheSpec(FLOAT32)


@pytree
class SimulatedLayers:
    """The cache of each layer: an index into the specs of the program, and scales."""

    spec: Int[Array | np.ndarray, " layers"]
    scales: LayerScales

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerCacheSpec],
        specs: Sequence[LayerCacheSpec],
        scales: KVScales,
        config: ModelConfig,
    ) -> "SimulatedLayers":
        """Return `layers` as indices into `specs`, the static argument of the program."""
        index = np.array([specs.index(spec) for spec in layers], np.int32)
        by_layer = LayerScales.of(
            scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim
        )
        return cls(index, by_layer)


def simulated_score(
    model: StepModel,
    weights: Weights,
    layers: SimulatedLayers,
    batch: ForwardBatch,
    pages: KVPool,
    *,
    specs: tuple[LayerCacheSpec, ...],
) -> tuple[Float[Array, "requests tokens vocab"], KVPool]:
    """Run `engine.step.logits` over a float32 pool with simulated quantization."""
    decoder = bind(model.config, weights, model.dtype)
    unit = unit_scales(model.config)

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        cached = paged_attend(
            model.attention, unit, model.options(decoder), chunk.metadata(model.groups)
        )
        positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
        hidden, pages = decoder(
            chunk.tokens,
            positions,
            attend=_quantize_first(cached, layers, specs),
            carry=pages,
            context=chunk.context,
        )
        return decoder.logits(hidden), pages

    scored: tuple[Array, KVPool] = each_request(one, batch, pages, out_axes=(0, None))
    return scored


def _quantize_first(
    attend: Attend, layers: SimulatedLayers, specs: Sequence[LayerCacheSpec]
) -> Attend:
    """Return `attend` with keys and values quantized and dequantized by the format of the layer."""

    def quantizer(spec: LayerCacheSpec) -> Callable[[Layer, KV, KV], tuple[KV, KV]]:
        def quantize(layer: Layer, k: KV, v: KV) -> tuple[KV, KV]:
            if spec == UNQUANTIZED:
                return k.astype(jnp.float32), v.astype(jnp.float32)
            return fake_quant(spec, layers.scales, k, v, layer=layer)

        return quantize

    quantizers = [quantizer(spec) for spec in specs]

    def attend_quantized(
        layer: Layer, q: Query, k: KV, v: KV, pages: KVPool
    ) -> tuple[Query, KVPool]:
        k, v = lax.switch(layers.spec[layer], quantizers, layer, k, v)
        return attend(layer, q, k, v, pages)

    return attend_quantized
