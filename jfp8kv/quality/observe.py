"""Statistics of keys and values in a forward pass, and the forward pass of calibration.

`observe` wraps any `attend` over a paged cache. Calibration and comparison differ only in the
function that updates the statistics.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Int

from jfp8kv.attention.interface import Attend, AttentionMetadata, Query, paged_attend
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, new_pool
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import FLOAT32
from jfp8kv.core.pytree import AnyArray, pytree
from jfp8kv.engine.step import StepModel, Weights
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import bind
from jfp8kv.models.rope import angles
from jfp8kv.quality.key_offsets import KeyTransform

PAGE_SIZE = 64

S = TypeVar("S")
Update: TypeAlias = Callable[[S, Layer, KV, KV, KVPool], S]
"""A function that adds the keys and values of a layer, already in the pool, to the statistics."""


def observe(
    attend: Attend, update: Update[S]
) -> Callable[[Layer, Query, KV, KV, tuple[KVPool, S]], tuple[Query, tuple[KVPool, S]]]:
    """Return an `attend` whose carry is the pool and statistics, which `update` updates.

    The output of attention does not change. `update` runs after the write to the pool.
    """

    def observed(
        layer: Layer, q: Query, k: KV, v: KV, carry: tuple[KVPool, S]
    ) -> tuple[Query, tuple[KVPool, S]]:
        pages, statistics = carry
        out, pages = attend(layer, q, k, v, pages)
        return out, (pages, update(statistics, layer, k, v, pages))

    return observed


@pytree
class CalibrationChunk:
    """Tokens `start .. length-1` of a sequence of `context` tokens, followed by padding."""

    tokens: Int[AnyArray, " tokens"]
    start: Int[AnyArray, ""]
    length: Int[AnyArray, ""]
    context: Int[AnyArray, ""]


def calibration_step(
    model: StepModel,
    weights: Weights,
    chunk: CalibrationChunk,
    transform: KeyTransform,
    carry: tuple[KVPool, Any],
) -> tuple[KVPool, Any]:
    """Return the pool and the observer after one chunk; jitted as `run_calibration_step`.

    The cache and attention are float32, whatever the dtype of the activations. Page `i` of the
    sequence is page `i` of the pool.
    """
    config = model.config
    start = jnp.asarray(chunk.start)
    length = jnp.asarray(chunk.length)
    context = jnp.asarray(chunk.context)
    tokens = jnp.asarray(chunk.tokens)
    pages, _ = carry
    decoder = bind(config, weights, model.dtype)
    page_table = jnp.arange(pages.num_pages, dtype=jnp.int32)
    metadata = AttentionMetadata(page_table, start, length, length)
    cached = paged_attend(
        model.attention, unit_scales(config), model.options(decoder), lambda layer: metadata
    )
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    valid = positions < length
    rotations = angles(config, positions, context) if config.ropes else None
    observed_block = transform.bind(config, rotations)

    def update(observer: Any, layer: Layer, k: KV, v: KV, pages: KVPool) -> Any:
        return observer.update(layer, observed_block(layer, k, v), valid)

    attend = observe(_in_float32(cached), update)
    _, carry = decoder(tokens, positions, attend=attend, carry=carry, context=context)
    return carry


run_calibration_step = jax.jit(calibration_step, static_argnums=0, donate_argnums=4)


def _in_float32(attend: Attend) -> Attend:
    """Return `attend` in float32. Its output has the dtype of the queries."""

    def attend_float32(layer: Layer, q: Query, k: KV, v: KV, pages: KVPool) -> tuple[Query, KVPool]:
        out, pages = attend(layer, q.astype(jnp.float32), k, v, pages)
        return out.astype(q.dtype), pages

    return attend_float32


def unit_scales(config: ModelConfig) -> LayerScales:
    """Return scale 1 for every channel."""
    return LayerScales.of(
        KVScales.unit(config.layers),
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )


def new_float32_pool(config: ModelConfig, tokens: int) -> KVPool:
    """Return a float32 pool for one sequence of `tokens` tokens in every layer."""
    return new_pool(
        PoolLayout.uniform(FLOAT32, config.layers),
        num_pages=tokens // PAGE_SIZE,
        page_size=PAGE_SIZE,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )
