"""`plan_kv`: measure what each way of keeping each layer costs, choose, and measure the choice as a whole."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jfp8kv.cache.config import CacheConfig, context_length
from jfp8kv.cache.groups import LayerGroups, PageRequirements
from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.plan import KVPlan
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import BFLOAT16
from jfp8kv.engine.buckets import default_prefill_chunk, max_tokens_per_dispatch, step_token_budget
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.forward import run_chunks
from jfp8kv.engine.options import EngineOptions
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params
from jfp8kv.quality.calibration_options import plan as calibration_plan
from jfp8kv.quality.data import pieces, stream
from jfp8kv.quality.layer_candidates import Candidates, as_plan, dtypes
from jfp8kv.quality.metrics import divergence
from jfp8kv.quality.pareto import Point, pareto_front
from jfp8kv.quality.simulate import UNQUANTIZED, SimulatedLayers, simulated

WINDOW = 512  # tokens measured together; the logits of so many are held
PAGE_SIZE = 64
TRIES = 8  # choices measured as a whole before a loss is called out of reach


def planned(
    params: Params,
    texts: Any,
    *,
    budget: Any = None,
    max_loss: Any = None,
    kv_dtypes: Any = ("bfloat16", "fp8_e4m3"),
    window: Any = None,
    max_model_len: Any = None,
    progress: bool | None = None,
) -> KVPlan:
    """See `jfp8kv.plan_kv`."""
    calibration_plan(
        window=window, max_model_len=max_model_len
    )  # raises for what is no number of tokens
    config, longest = params.config, context_length(params.config, max_model_len)
    names, window = dtypes(kv_dtypes), min(window or WINDOW, longest)
    if (budget is None) == (max_loss is None):
        raise ConfigError(
            "give either budget (bytes per token) or max_loss (nats of KL divergence per token)."
        )
    costs = CacheCosts(config, longest)
    most_bytes, most_loss = costs.budget(budget), _loss(max_loss)
    known, measured = _halves(params, texts, longest, window)
    candidates = Candidates.of(params, names, known, longest=longest)
    trial = SensitivityAnalysis(params, candidates, measured, progress)
    losses = trial.by_layer()
    points = pareto_front(
        [
            [costs.of(layer, plan.spec) for plan in candidates.plans]
            for layer in range(config.layers)
        ],
        losses,
    )
    chosen, loss = (
        _within_bytes(points, costs, trial, most_bytes)
        if max_loss is None
        else _within_loss(points, trial, most_loss)
    )
    layers, scales = candidates.chosen(chosen.ways, losses)
    return as_plan(layers, scales, costs.bytes_per_token([layer.spec for layer in layers]), loss)


@dataclasses.dataclass(frozen=True)
class CacheCosts:
    """Bytes of cache in a text of the longest length, where a window makes a layer cheaper than others."""

    config: ModelConfig
    longest: int

    @property
    def _sizes(self) -> dict[str, int]:
        return {
            "page_size": PAGE_SIZE,
            "max_tokens_per_dispatch": max_tokens_per_dispatch(default_prefill_chunk()),
        }

    def of(self, layer: int, kind: LayerCacheSpec) -> int:
        """Bytes of one layer's pages."""
        c = self.config
        (pages,) = PageRequirements(LayerGroups.of((c.window(layer),)), **self._sizes).of(
            self.longest
        )
        return pages * PAGE_SIZE * 2 * c.kv_heads * (c.head_dim * kind.fmt.itemsize + kind.dynamic)

    def bytes_per_token(self, kinds: Sequence[LayerCacheSpec]) -> float:
        """What an engine's `stats` say of layers of these kinds."""
        return CacheConfig(tuple(kinds), None, self.config, **self._sizes).bytes_per_token(
            self.longest
        )

    def budget(self, given: Any) -> float | None:
        """Bytes per token of `2048`, "2KiB" or "60%", which is of what bfloat16 takes. Raises `ConfigError`."""
        if given is None:
            return None
        share = (
            re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", given) if isinstance(given, str) else None
        )
        text = (
            re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(k|ki|m|mi)?b?\s*", given.lower())
            if isinstance(given, str)
            else None
        )
        if share:
            given = (
                float(share[1])
                / 100
                * self.bytes_per_token([LayerCacheSpec(BFLOAT16)] * self.config.layers)
            )
        elif text:
            given = (
                float(text[1]) * {None: 1, "k": 1e3, "ki": 2**10, "m": 1e6, "mi": 2**20}[text[2]]
            )
        if (
            isinstance(given, bool)
            or not isinstance(given, int | float)
            or not 0 < given < float("inf")
        ):
            raise ConfigError(
                f"budget={given!r}: must be bytes per token, such as 2048 or '2KiB', or a share of what bfloat16 takes, '60%'."
            )
        return float(given)


def _loss(given: Any) -> float | None:
    if given is not None and (
        isinstance(given, bool)
        or not isinstance(given, int | float)
        or not 0 < given < float("inf")
    ):
        raise ConfigError(
            f"max_loss={given!r}: must be a positive number of nats per token, such as 0.01."
        )
    return None if given is None else float(given)


def _halves(
    params: Params, texts: Any, longest: int, window: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces to calibrate on and pieces to measure on, taken in turns: no scale is judged by the text it was made for, unless
    there is one piece alone."""
    cut = (
        piece
        for text in pieces(stream(texts)[0], params, max_model_len=longest, window=window)
        for piece in text
    )
    every = [piece for piece in cut if len(piece) > 1]
    if not every:
        raise ConfigError("texts hold no two tokens in a row: there is nothing to predict.")
    return (every[::2], every[1::2]) if len(every) > 1 else (every, every)


class SensitivityAnalysis:
    """Runs the measuring texts through the model with each layer kept in some way, against the float32 cache."""

    def __init__(
        self, params: Params, candidates: Candidates, texts: list[list[int]], progress: bool | None
    ):
        self.config, self.candidates, self.texts, self.progress = (
            params.config,
            candidates,
            texts,
            progress,
        )
        self.known = tuple(dict.fromkeys([UNQUANTIZED, *(plan.spec for plan in candidates.plans)]))
        longest = max(map(len, texts))
        engine_options = EngineOptions(
            kv_dtype="float32",
            max_model_len=longest,
            max_num_seqs=1,
            max_num_batched_tokens=step_token_budget(WINDOW, 1),
        )
        self.engine = Engine(params, engine_options)
        self.plain = [None] * self.config.layers

    def by_layer(self) -> np.ndarray:
        """KL divergence in nats per token `[layers, ways]` if that layer alone is kept so."""
        layers, ways = range(self.config.layers), range(len(self.candidates.plans))
        tries = [
            [*self.plain[:layer], way, *self.plain[layer + 1 :]] for layer in layers for way in ways
        ]
        return np.array(list(self._losses(tries))).reshape(len(layers), len(ways))

    def whole(self, ways: Sequence[int]) -> float:
        """KL divergence in nats per token if every layer is kept so."""
        return next(self._losses([list(ways)]))

    def _losses(self, tries: list[list[int | None]]) -> Iterator[float]:
        from tqdm import tqdm

        total = np.zeros(len(tries))
        hidden = (None if len(tries) > 1 else True) if self.progress is None else not self.progress
        with tqdm(total=len(tries) * len(self.texts), unit="pass", disable=hidden) as bar:
            for ids in self.texts:
                base = list(self._logits(ids, self.plain))
                for i, ways in enumerate(tries):
                    for (count, want), (_, got) in zip(base, self._logits(ids, ways), strict=True):
                        total[i] += float(
                            np.sum(np.asarray(_divergence(want, got))[:count], dtype=np.float64)
                        )
                    bar.update()
        yield from total / sum(map(len, self.texts))

    def _logits(self, ids: list[int], ways: list[int | None]) -> Iterator[tuple[int, Any]]:
        """How many tokens a chunk has, and the logits after each `[requests, tokens, vocab]`, on the device."""
        layers = self._ways(ways)
        for chunk, logits in run_chunks(
            self.engine, ids, simulated, scales=layers, known=self.known
        ):
            yield len(chunk), logits

    def _ways(self, ways: list[int | None]) -> SimulatedLayers:
        kinds = [UNQUANTIZED if way is None else self.candidates.plans[way].spec for way in ways]
        return SimulatedLayers.of(kinds, self.known, self.candidates.mixed(ways), self.config)


@jax.jit
def _divergence(base: Any, other: Any) -> Any:
    return divergence(base[0], other[0])


def _within_bytes(
    points: list[Point], costs: CacheCosts, trial: SensitivityAnalysis, most: float
) -> tuple[Point, float]:
    """The choice of least loss that a pool can hold in so many bytes."""
    plans = trial.candidates.plans
    for point in reversed(points):
        if costs.bytes_per_token([plans[way].spec for way in point.ways]) <= most:
            return point, trial.whole(point.ways)
    least = min(costs.bytes_per_token([plans[way].spec for way in point.ways]) for point in points)
    raise ConfigError(
        f"budget={most:g}: no cache of these formats takes less than {least:,.0f} bytes per token."
    )


def _within_loss(
    points: list[Point], trial: SensitivityAnalysis, most: float
) -> tuple[Point, float]:
    """The choice of fewest bytes whose loss as a whole, measured, is within `most`.

    Losses of layers add up to first order only, so the sum that is asked of them is corrected by what it came to.
    """
    target, found = most, None
    for _ in range(TRIES):
        point = next((point for point in points if point.loss <= target), points[-1])
        loss = trial.whole(point.ways)
        if loss <= most:
            return point, loss
        found = min(loss, found or loss)
        if point is points[-1]:
            break
        target = min(target * 0.9 * most / loss, point.loss * 0.99)
    raise ConfigError(
        f"max_loss={most:g}: the least that was reached is {found:.3g} nats per token; add 'float32' to kv_dtypes?"
    )
