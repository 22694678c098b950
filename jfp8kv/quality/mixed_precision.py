"""`plan_kv`: measure the loss of each option in each layer, choose a plan, and measure its loss."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeAlias, Unpack

import jax
import numpy as np
from jaxtyping import Array

from jfp8kv.cache.config import CacheConfig, context_length
from jfp8kv.cache.groups import LayerGroups, PageRequirements
from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.plan import KVPlan
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.compilation_cache import use_compilation_cache
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import BFLOAT16
from jfp8kv.core.options import takes
from jfp8kv.engine.buckets import default_prefill_chunk, max_tokens_per_dispatch, step_token_budget
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.forward import run_chunks
from jfp8kv.engine.options import EngineOptions
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params
from jfp8kv.quality.data import Prompts, iterate_prompts, split_prompts
from jfp8kv.quality.keywords import PlanFields
from jfp8kv.quality.layer_options import LayerOptions
from jfp8kv.quality.metrics import kl_divergence
from jfp8kv.quality.observe import PAGE_SIZE
from jfp8kv.quality.options import PlanOptions
from jfp8kv.quality.pareto import Point, pareto_front
from jfp8kv.quality.simulate import UNQUANTIZED, SimulatedLayers, simulated_score

WINDOW = 512  # tokens of a window; the logits of two windows are in memory at the same time
MAX_TRIALS = 8  # whole plans that are measured before a maximum loss is refused

Assignment: TypeAlias = Sequence[int | None]
"""The option of each layer; None is a layer that is not quantized."""


@takes(PlanOptions)
def plan_kv(
    params: ModelLike,
    texts: Prompts,
    *,
    progress: bool | None = None,
    **options: Unpack[PlanFields],
) -> KVPlan:
    """Choose the cache format of each layer: minimum loss for a size, or minimum size for a loss.

    Loss is the KL divergence from the unquantized cache. A sensitivity analysis measures it for
    every option in every layer, with the other layers unquantized. Then the loss of the chosen plan
    is measured. The options are `kv_dtypes`, for FP8 with scale 1 and with scales per head, per
    channel, and per token and head, the last two also with K offsets. Every second window of
    `texts` is used to calibrate, and the others to measure, in (layers x options) passes. A few
    thousand tokens suffice.

        plan = jfp8kv.plan_kv(params, texts, budget="60%")
        print(plan)
        jfp8kv.generate(params, "Once", kv_dtype=plan)

    Args:
      params: a `Params`, or a path or hub id as for `load`.
      texts: as `prompts` of `generate`, or any iterable of such.
      progress: show a progress bar; None shows one on a terminal.
      **options: the fields of `PlanOptions`, listed below.

    Returns:
      A plan, to give as `kv_dtype` to `generate` or `LLM`, to print or to save.

    Raises:
      ConfigError: an invalid option or text, or a budget that no plan meets. The message says which
        budget is possible.
    """
    checked = PlanOptions.from_fields(also=("progress",), **options)
    use_compilation_cache()
    return _plan(as_params(params), texts, checked, progress)


def _plan(params: Params, texts: Prompts, options: PlanOptions, progress: bool | None) -> KVPlan:
    config = params.config
    max_model_len = context_length(config, options.max_model_len)
    costs = CacheCosts(config, max_model_len)
    window = min(options.window or WINDOW, max_model_len)
    calibration, measured = _split_in_half(params, texts, max_model_len, window)
    layer_options = LayerOptions.of(
        params, options.kv_dtypes, calibration, max_model_len=max_model_len
    )
    analysis = SensitivityAnalysis(params, layer_options, measured, progress)
    losses = analysis.loss_by_layer()
    front = pareto_front(costs.table(layer_options), losses)
    max_bytes = options.max_bytes_per_token(costs.bfloat16_bytes_per_token)
    if max_bytes is not None:
        point = _within_bytes(front, costs, layer_options, max_bytes)
        loss = analysis.loss(point.options)
    else:
        assert options.max_loss is not None, "there is one budget"
        point, loss = _within_loss(front, analysis, options.max_loss)
    return layer_options.kv_plan(
        point.options,
        losses,
        bytes_per_token=costs.bytes_per_token(_specs(layer_options, point)),
        loss=loss,
    )


def _specs(layer_options: LayerOptions, point: Point) -> list[LayerCacheSpec]:
    return [layer_options.plans[option].spec for option in point.options]


@dataclasses.dataclass(frozen=True)
class CacheCosts:
    """The size of a cache for sequences of `max_model_len` tokens. Sliding windows cost less."""

    config: ModelConfig
    max_model_len: int

    def table(self, layer_options: LayerOptions) -> list[list[int]]:
        """Return the bytes of the pages of one sequence, by layer and option."""
        specs = [plan.spec for plan in layer_options.plans]
        return [
            [self.layer_bytes(layer, spec) for spec in specs] for layer in range(self.config.layers)
        ]

    def layer_bytes(self, layer: int, spec: LayerCacheSpec) -> int:
        """Return the bytes of the pages of one sequence in one layer."""
        config = self.config
        group = LayerGroups.of((config.window(layer),))
        requirements = PageRequirements(group, PAGE_SIZE, self._max_tokens_per_dispatch)
        (pages,) = requirements.of(self.max_model_len)
        values = config.head_dim * spec.fmt.itemsize + spec.dynamic
        return pages * PAGE_SIZE * 2 * config.kv_heads * values

    def bytes_per_token(self, specs: Sequence[LayerCacheSpec]) -> float:
        """Return the bytes per token of layers with these specs, as in `llm.stats`."""
        config = CacheConfig(
            tuple(specs), None, self.config, PAGE_SIZE, self._max_tokens_per_dispatch
        )
        return config.bytes_per_token(self.max_model_len)

    @property
    def bfloat16_bytes_per_token(self) -> float:
        """Bytes per token of a bfloat16 cache."""
        return self.bytes_per_token([LayerCacheSpec(BFLOAT16)] * self.config.layers)

    @property
    def _max_tokens_per_dispatch(self) -> int:
        return max_tokens_per_dispatch(default_prefill_chunk())


def _split_in_half(
    params: Params, texts: Prompts, max_model_len: int, window: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return alternating windows to calibrate on and to measure on.

    No scale is measured on the window it was calibrated on, unless there is only one.
    """
    data, _ = iterate_prompts(texts)
    prompts = split_prompts(data, params, max_model_len=max_model_len, window=window)
    windows = [ids for each in prompts for ids in each if len(ids) > 1]
    if not windows:
        raise ConfigError("texts have no two consecutive tokens: there is nothing to predict.")
    return (windows[::2], windows[1::2]) if len(windows) > 1 else (windows, windows)


class SensitivityAnalysis:
    """Measures the KL divergence of simulated caches from the float32 cache."""

    def __init__(
        self,
        params: Params,
        layer_options: LayerOptions,
        windows: list[list[int]],
        progress: bool | None,
    ):
        self.config = params.config
        self.layer_options = layer_options
        self.windows = windows
        self.progress = progress
        specs = [plan.spec for plan in layer_options.plans]
        self.specs = tuple(dict.fromkeys([UNQUANTIZED, *specs]))
        self.unquantized: list[int | None] = [None] * self.config.layers
        engine_options = EngineOptions(
            kv_dtype="float32",
            max_model_len=max(map(len, windows)),
            max_num_seqs=1,
            max_num_batched_tokens=step_token_budget(WINDOW, 1),
        )
        self.engine = Engine(params, engine_options)

    def loss_by_layer(self) -> np.ndarray:
        """Return nats per token, `[layers, options]`, with only that layer quantized."""
        layers = range(self.config.layers)
        options = range(len(self.layer_options.plans))
        assignments = []
        for layer in layers:
            for option in options:
                assignment = list(self.unquantized)
                assignment[layer] = option
                assignments.append(assignment)
        return self._losses(assignments).reshape(len(layers), len(options))

    def loss(self, options: Assignment) -> float:
        """Return the loss in nats per token with these options of the layers."""
        return float(self._losses([options])[0])

    def _losses(self, assignments: Sequence[Assignment]) -> np.ndarray:
        from tqdm import tqdm

        totals = np.zeros(len(assignments))
        hidden: bool | None = None  # tqdm then shows a bar if stderr is a terminal
        if self.progress is not None:
            hidden = not self.progress
        elif len(assignments) == 1:
            hidden = True
        total = len(assignments) * len(self.windows)
        with tqdm(total=total, unit="pass", disable=hidden) as bar:
            for ids in self.windows:
                base = list(self._logits(ids, self.unquantized))
                for i, assignment in enumerate(assignments):
                    quantized = self._logits(ids, assignment)
                    for (tokens, base_logits), (_, logits) in zip(base, quantized, strict=True):
                        kl = np.asarray(_kl_of_first_request(base_logits, logits))[:tokens]
                        totals[i] += float(np.sum(kl, dtype=np.float64))
                    bar.update()
        return totals / sum(map(len, self.windows))

    def _logits(self, ids: list[int], assignment: Assignment) -> Iterator[tuple[int, Array]]:
        """Yield the number of tokens of each chunk, and logits `[requests, tokens, vocab]`."""
        plans = self.layer_options.plans
        layers = [UNQUANTIZED if option is None else plans[option].spec for option in assignment]
        scales = self.layer_options.mixed_scales(assignment)
        simulated = SimulatedLayers.of(layers, self.specs, scales, self.config)
        chunks = run_chunks(self.engine, ids, simulated_score, scales=simulated, specs=self.specs)
        for positions, logits in chunks:
            yield len(positions), logits


@jax.jit
def _kl_of_first_request(base: Array, other: Array) -> Array:
    return kl_divergence(base[0], other[0])


def _within_bytes(
    front: list[Point], costs: CacheCosts, layer_options: LayerOptions, max_bytes: float
) -> Point:
    """Return the point of minimum loss with at most `max_bytes` bytes per token."""
    sizes = [costs.bytes_per_token(_specs(layer_options, point)) for point in front]
    for point, size in zip(reversed(front), reversed(sizes), strict=True):
        if size <= max_bytes:
            return point
    raise ConfigError(
        f"budget={max_bytes:g}: a cache of these formats takes at least {min(sizes):,.0f} bytes "
        "per token; give that budget, or add a smaller format to kv_dtypes."
    )


def _within_loss(
    front: list[Point], analysis: SensitivityAnalysis, max_loss: float
) -> tuple[Point, float]:
    """Return the smallest point whose measured loss is at most `max_loss`, and that loss.

    The losses of layers add up only to first order. So the target for their sum is lowered by the
    ratio of the limit to the measured loss, until a plan fits.
    """
    target = max_loss
    min_loss = np.inf
    for _ in range(MAX_TRIALS):
        point = next((point for point in front if point.loss <= target), front[-1])
        loss = analysis.loss(point.options)
        if loss <= max_loss:
            return point, loss
        min_loss = min(min_loss, loss)
        if point is front[-1]:
            break
        target = min(target * 0.9 * max_loss / loss, point.loss * 0.99)
    raise ConfigError(
        f"max_loss={max_loss:g}: the smallest measured loss is {min_loss:.3g} nats per token; "
        "give a larger max_loss, or add 'float32' to kv_dtypes."
    )
