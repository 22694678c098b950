"""The comparison itself: all caches over the same texts in lockstep, chunk by chunk, through engines of their own.

The engines share the weights; each has a pool that holds the longest text and no more. After a chunk the logits of every cache
are set against the float32 cache's and dropped, so that memory does not grow with the texts: at any time the logits of
two caches are alive, and what setting them against each other takes. MeanObserver are kept in float64 on the host.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfp8kv.cache.config import context_length, resolve_cache
from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.buckets import (
    default_prefill_chunk,
    max_logits_tokens,
    max_tokens_per_dispatch,
    step_token_budget,
)
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.forward import run_chunks
from jfp8kv.engine.options import EngineOptions
from jfp8kv.models.params import Params
from jfp8kv.quality.cache_choices import CacheChoice, choices, with_calibrated
from jfp8kv.quality.compare_options import Plan
from jfp8kv.quality.data import pieces, stream
from jfp8kv.quality.metrics import Scores, scores
from jfp8kv.quality.needle import Needle, lengths_for, needles
from jfp8kv.quality.quality_report import QualityReport
from jfp8kv.quality.quantization_stats import Seen, watched
from jfp8kv.quality.summary import magnitudes_of, summary
from jfp8kv.quality.totals import Totals

PAGE_SIZE = 64


def comparison(
    params: Params, texts: Any, plan: Plan, *, calibration: Any = None, progress: bool | None = None
) -> QualityReport:
    """Compare caches; see `jfp8kv.compare`. All is checked, and scales are calibrated, before the first text is run."""
    most = context_length(params.config, plan.max_model_len)
    window = most if plan.window is None else context_length(params.config, plan.window)
    asked = choices(params, plan.kv_dtypes, plan.kv_scales, longest=most)
    lengths = lengths_for(plan.needle_lengths, most)
    cut = partial(pieces, params=params, max_model_len=most, window=window)
    prompts = _calibration_prompts(cut, asked, calibration)
    whole = [
        piece
        for text in _at_least_one("texts", cut(stream(texts, what="texts")[0], what="text"))
        for piece in text
    ]
    used = [piece for piece in whole if len(piece) > 1]
    if not used:
        raise ConfigError("texts hold no two tokens in a row: there is nothing to predict.")
    hidden = needles(
        np.concatenate([np.asarray(piece, np.int32) for piece in whole]),
        lengths,
        plan.needle_depths,
    )
    asked = with_calibrated(params, asked, prompts)
    longest = max(map(len, [*used, *(needle.ids for needle in hidden)]))
    sides = _sides(params, asked, longest=longest, most=most)
    with _bar((len(used) + len(hidden)) * len(sides), progress) as bar:
        for piece in used:
            _over_text(sides, piece)
            bar.update(len(sides))
        for needle in hidden:
            for side in sides:
                side.totals.recall.append(_recall(side, needle))
                bar.update()
    base = sides[0].totals
    return QualityReport(
        tokens=sum(map(len, used)),
        pieces=len(used),
        window=window,
        needle_lengths=lengths if hidden else (),
        needle_depths=plan.needle_depths if hidden else (),
        choices=tuple(
            summary(
                each.choice,
                each.engine.cache_config,
                each.totals,
                base,
                len(plan.needle_depths),
                most,
            )
            for each in sides
        ),
        magnitudes=magnitudes_of(base),
    )


@dataclasses.dataclass
class CacheRun:
    """A cache, the engine that has it, and what was found so far."""

    choice: CacheChoice
    engine: Engine
    totals: Totals
    base: bool  # the float32 cache, which also sees how large keys and values are

    def run_chunks(self, ids: list[int]) -> Iterator[tuple[range, tuple[Any, Seen]]]:
        """Run a text: positions, their logits `[requests, tokens, vocab]`, what was seen."""
        return run_chunks(self.engine, ids, watched, magnitudes=self.base)


def _calibration_prompts(
    cut: Any, asked: Sequence[CacheChoice], calibration: Any
) -> list[list[list[int]]]:
    """The token ids of the prompts to calibrate on, none if no choice wants them. Raises `ConfigError` where they lack."""
    wanting = [choice.label for choice in asked if choice.calibrated]
    if wanting and calibration is None:
        raise ConfigError(
            f"{wanting[0]}: scales are to be calibrated, and calibration is None: give it prompts to find them on."
        )
    if calibration is not None and not wanting:
        raise ConfigError(
            "calibration was given and no choice uses it: add 'tensor', 'head' or 'channel' to kv_scales."
        )
    if not wanting:
        return []
    return _at_least_one(
        "calibration", cut(stream(calibration, what="calibration")[0], what="calibration prompt")
    )


def _at_least_one(name: str, prompts: Iterable[list[list[int]]]) -> list[list[list[int]]]:
    found = list(prompts)
    if not found:
        raise ConfigError(f"{name} is empty: give at least one.")
    return found


def _sides(
    params: Params, asked: Sequence[CacheChoice], *, longest: int, most: int
) -> list[CacheRun]:
    """Engines that serve texts of up to `most` tokens, which some choose scales by, with room for one of `longest`."""
    chunk = min(
        default_prefill_chunk(), max(16, max_logits_tokens(params.config.vocab)), longest
    )
    budget = step_token_budget(chunk, 1)
    sides: list[CacheRun] = []
    for choice in asked:
        room = resolve_cache(
            params,
            choice.kv_dtype,
            choice.kv_scales,
            page_size=PAGE_SIZE,
            max_tokens_per_dispatch=max_tokens_per_dispatch(chunk),
            longest=most,
        ).sequence_bytes(longest)
        engine_options = EngineOptions(
            kv_dtype=choice.kv_dtype,
            kv_scales=choice.kv_scales,
            kv_cache_memory=room,
            max_model_len=most,
            max_num_seqs=1,
            max_num_batched_tokens=budget,
            page_size=PAGE_SIZE,
        )
        weights = sides[0].engine.programs.weights if sides else None
        engine = Engine(params, engine_options, weights=weights)
        sides.append(CacheRun(choice, engine, Totals(), base=not sides))
    return sides


def _over_text(sides: Sequence[CacheRun], ids: list[int]) -> None:
    """Run one text through every cache, chunk by chunk, and add what each chunk says to the totals."""
    with ExitStack() as stack:
        runs = [stack.enter_context(closing(side.run_chunks(ids))) for side in sides]
        for side in sides:
            side.totals.begin()
        for chunk, (base, seen) in runs[0]:
            following = np.zeros(base.shape[1], np.int32)
            predicted = min(chunk.stop, len(ids) - 1) - chunk.start
            following[:predicted] = ids[chunk.start + 1 : chunk.start + 1 + predicted]
            for side, run in zip(sides, runs, strict=True):
                logits, seen = (base, seen) if side.base else next(run)[1]
                found = jax.device_get(_scores(base, logits, following))
                _require_finite(found, predicted, side.base)
                side.totals.add(
                    found, jax.tree.map(lambda x: x[0], jax.device_get(seen)), predicted, len(chunk)
                )
                del logits


@jax.jit
def _scores(base: Any, other: Any, following: Any) -> Scores:
    return scores(base[0], other[0], following)


@jax.jit
def _likeliest(logits: Any) -> Any:
    return jnp.argmax(logits[0], axis=-1)


def _require_finite(found: Scores, count: int, base: bool) -> None:
    if base and not np.all(np.isfinite(found.nll[:count])):
        raise ConfigError(
            "the logits are not finite, under a float32 cache too: check the weights, or load them with dtype='float32'."
        )


def _recall(side: CacheRun, needle: Needle) -> float:
    """The share of the needle's tokens after the cue that were the likeliest."""
    likeliest = [
        np.asarray(_likeliest(logits))[: len(chunk)]
        for chunk, (logits, _) in side.run_chunks(needle.ids)
    ]
    return float(
        np.mean(np.concatenate(likeliest)[needle.first - 1 : -1] == needle.ids[needle.first :])
    )


def _bar(total: int, progress: bool | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="pass", disable=None if progress is None else not progress)
