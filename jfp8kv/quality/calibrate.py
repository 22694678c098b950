"""The pass over the data: the engine's forward pass over a small float32 cache, with an `attend` that also watches.

One prompt at a time, in chunks whose widths follow from the prompt's length alone: what a prompt adds to the statistics then
depends on nothing beside it, to the last bit, and merging is exact. So order and grouping of the data change nothing. What is
kept (the statistics, a cache for one prompt) does not grow with the number of prompts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jfp8kv.attention import xla
from jfp8kv.attention.interface import Attend, AttentionMetadata, Query, paged_attend
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import KV, KVPool, Layer, LayerScales, new_pool
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import FLOAT32
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.buckets import Buckets, default_prefill_chunk, step_token_budget
from jfp8kv.engine.step import StepModel, Weights
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import bind
from jfp8kv.models.key_bias import mean_rotated_bias
from jfp8kv.models.linear import on_cpu
from jfp8kv.models.params import Params
from jfp8kv.models.rope import angles
from jfp8kv.quality.calibration_options import Plan
from jfp8kv.quality.data import Spool, pieces, stream
from jfp8kv.quality.key_offsets import AroundMean, AsCached, BeforeRope, KeyTransform, Seen
from jfp8kv.quality.observers import (
    AmaxObserver,
    HistogramObserver,
    MeanObserver,
    MSEObserver,
    Real,
    ScaleShape,
)

Statistics = Any  # AmaxObserver, HistogramObserver or MSEObserver
Carry = tuple[KVPool, Statistics]
PAGE_TOKENS, POOL_TOKENS = (
    64,
    512,
)  # the cache for one prompt: so many tokens, or 4, 16, ... times as many


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Scales, and how much they were made from."""

    scales: KVScales
    prompts: int
    tokens: int


def calibration(
    params: Params, prompts: Any, plan: Plan, *, progress: bool | None = None
) -> Calibration:
    """Choose scales for `params` from all of `prompts`. MSEObserver as for `jfp8kv.calibrate`."""
    c = params.config
    units = ScaleShape(c.layers, c.kv_heads, c.head_dim, plan.granularity)
    most = plan.most_tokens(c)
    prompts, count = stream(prompts)
    todo = pieces(prompts, params, max_model_len=most, window=plan.window)
    watch = Calibrator(params, units)
    with Spool() as spool:
        if plan.k_offset:
            scales = _with_offsets(
                watch, todo, spool, plan, most, partial(_bar, progress=progress), count
            )
            return Calibration(scales, watch.prompts, watch.tokens)
        if plan.observer == "percentile":
            first = watch.over(_bar(todo, count, progress), HistogramObserver.empty(units))
            chosen = first.scales(plan.fmt, plan.percentile)
        elif plan.observer == "mse":
            first = watch.over(
                _bar(spool.keep(todo), count, progress, "largest values"), AmaxObserver.empty(units)
            )
            again = _bar(spool.again(), watch.prompts, progress, "errors")
            chosen = watch.over(again, MSEObserver.of(first, plan.fmt)).scales()
        else:
            chosen = watch.over(_bar(todo, count, progress), AmaxObserver.empty(units)).scales(
                plan.fmt, plan.headroom
            )
    return Calibration(
        KVScales(chosen[:, 0], chosen[:, 1], kv_dtype=plan.fmt.name), watch.prompts, watch.tokens
    )


def _with_offsets(
    watch: "Calibrator",
    todo: Iterable,
    spool: Spool,
    plan: Plan,
    most: int,
    bar: Callable[..., Iterable],
    count: int | None,
) -> KVScales:
    """K offsets, from a first pass over the prompts, and the scales of what is left, from a second."""
    c = watch.model.config
    each = dataclasses.replace(watch.units, granularity="channel")
    sums = watch.over(
        bar(spool.keep(todo), count, what="means"), MeanObserver.empty(each), BeforeRope()
    )
    mean = sums.mean(watch.tokens)
    offset, swing = mean_rotated_bias(c, mean, most)
    around = watch.over(
        bar(spool.again(), watch.prompts, what="largest values"),
        AmaxObserver.empty(each),
        AroundMean(mean),
    )
    chosen = around.wider(swing).shared(watch.units).scales(plan.fmt, plan.headroom)
    return KVScales(chosen[:, 0], chosen[:, 1], k_offset=offset, kv_dtype=plan.fmt.name)


class Calibrator:
    """Runs prompts through the model and counts them."""

    def __init__(self, params: Params, units: ScaleShape):
        cpu = jax.default_backend() == "cpu"
        self.model = StepModel(params.config, params.dtype, xla.attention)
        self.weights = (
            jax.tree.map(lambda w: on_cpu(w, params.dtype), params.tree) if cpu else params.tree
        )
        self.units, self.buckets = units, Buckets(1, step_token_budget(default_prefill_chunk(), 1))
        self.prompts = self.tokens = 0
        self._pages: KVPool | None = None

    def over(
        self, prompts: Iterable[Any], statistics: Statistics, view: KeyTransform | None = None
    ) -> Statistics:
        """The statistics of all prompts, each a list of texts (token ids), on the host: of keys and values as the cache gets
        them, or as `view` turns them.

        Raises `ConfigError` if there are none, or for NaN or infinity.
        """
        total, room, held = None, statistics.room(self.units), 0
        self.prompts = self.tokens = 0
        view = AsCached() if view is None else view

        def taken(statistics: Statistics) -> Statistics:
            return statistics.host() if total is None else total.merge(statistics.host())

        for number, prompt in enumerate(prompts):
            for ids in prompt:
                for chunk in self._chunks(ids):
                    if held and held + len(chunk.tokens) > room:
                        total, statistics, held = taken(statistics), statistics.cleared(), 0
                    self._pages, statistics = observe(
                        self.model, self.weights, chunk, view, (self._pages, statistics)
                    )
                    held += len(chunk.tokens)
            _require_finite(statistics, number)
            self.prompts, self.tokens = number + 1, self.tokens + sum(map(len, prompt))
        if not self.prompts:
            raise ConfigError("prompts is empty: give at least one.")
        return taken(statistics)

    def _chunks(self, ids: list[int]) -> Iterator["Chunk"]:
        """One text as the step takes it, with a cache that holds all of it ready."""
        pool = POOL_TOKENS
        while pool < len(ids):
            pool *= 4
        if self._pages is None or self._pages.num_pages * PAGE_TOKENS != pool:
            self._pages = None  # freed before the next one is made
            self._pages = new_float32_pages(self.model.config, pool)
        start = 0
        while start < len(ids):
            width = self.buckets.chunk(len(ids) - start)
            tokens = np.full(width, self.model.config.vocab, np.int32)
            real = ids[start : start + width]
            tokens[: len(real)] = real
            yield Chunk(
                tokens, *(np.array(n, np.int32) for n in (start, start + len(real), len(ids)))
            )
            start += len(real)


@pytree
class Chunk:
    """Tokens `start .. length-1` of a text of `context` tokens; `tokens` past those are padding."""

    tokens: Int[Array | np.ndarray, " tokens"]
    start: Int[Array | np.ndarray, ""]
    length: Int[Array | np.ndarray, ""]
    context: Int[Array | np.ndarray, ""]


def observe_chunk(
    model: StepModel, weights: Weights, chunk: Chunk, view: KeyTransform, carry: Carry
) -> Carry:
    """The cache and the statistics after this chunk. Compiled as `observe`, which updates both in place."""
    decoder = bind(model.config, weights, model.dtype)
    pages = carry[0]
    metadata = AttentionMetadata(
        jnp.arange(pages.num_pages, dtype=jnp.int32), chunk.start, chunk.length, chunk.length
    )
    c = model.config
    unit = LayerScales.of(
        KVScales.unit(c.layers), layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim
    )
    positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
    seen = view.of(c, angles(c, positions, chunk.context) if c.ropes else None)
    cached = paged_attend(model.attention, unit, model.options(decoder), lambda layer: metadata)
    attend = observing(cached, seen, positions < chunk.length)
    return decoder(chunk.tokens, positions, attend=attend, carry=carry, context=chunk.context)[1]


observe = jax.jit(observe_chunk, static_argnums=0, donate_argnums=4)


def observing(attend: Attend, seen: Seen, real: Real) -> Callable[..., tuple[Query, Carry]]:
    """`attend` that updates statistics by what is `seen` of the keys and values it is given, which are those the cache gets.

    Attention itself is in float32 whatever the activations are.
    """

    def watched(layer: Layer, q: Query, k: KV, v: KV, carry: Carry) -> tuple[Query, Carry]:
        pages, statistics = carry
        out, pages = attend(layer, q.astype(jnp.float32), k, v, pages)
        return out.astype(q.dtype), (pages, statistics.update(layer, seen(layer, k, v), real))

    return watched


def new_float32_pages(config: ModelConfig, tokens: int) -> KVPool:
    """A cache that keeps `tokens` tokens of one text as they are, in every layer."""
    sizes = {"kv_heads": config.kv_heads, "head_dim": config.head_dim, "page_size": PAGE_TOKENS}
    return new_pool(
        PoolLayout.uniform(FLOAT32, config.layers), num_pages=tokens // PAGE_TOKENS, **sizes
    )


def _require_finite(statistics: Statistics, prompt: int) -> None:
    """Raise `ConfigError` naming the layer if the keys or values seen so far were not all finite."""
    if isinstance(statistics, MSEObserver):
        return  # a first pass has seen the same
    peaks = statistics if isinstance(statistics, AmaxObserver) else statistics.peaks
    bad = np.argwhere(~np.isfinite(np.asarray(peaks.amax)))
    if len(bad):
        layer, kind, *_ = (int(i) for i in bad[0])
        value = "NaN" if np.isnan(np.asarray(peaks.amax)[tuple(bad[0])]) else "an infinity"
        raise ConfigError(
            f"prompt {prompt} gave {value} among the {'KV'[kind]} of layer {layer}: no scale fits it. Check the weights, "
            "or load them with dtype='float32'."
        )


def _bar(
    prompts: Iterable, count: int | None, progress: bool | None, what: str | None = None
) -> Iterable:
    """The prompts with a progress bar; None shows one on a terminal, unless they are known to be few."""
    from tqdm import tqdm

    hidden = (
        not progress if progress is not None else (None if count is None or count > 8 else True)
    )
    return tqdm(prompts, total=count, desc=what, unit="prompt", disable=hidden)
