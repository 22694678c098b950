"""`compare`: run the same texts through several caches in lockstep, with one engine per cache.

The engines share the weights, and each pool has room for one sequence. After each chunk the logits
of every cache are compared with those of the float32 cache and freed, so the logits of at most two
caches are in memory at a time. Sums are float64 on the host.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TypeAlias, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfp8kv.cache.config import context_length, resolve_cache
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.compilation_cache import use_compilation_cache
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.options import takes
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
from jfp8kv.quality.cache_choices import CacheChoice, cache_choices, with_calibrated_scales
from jfp8kv.quality.cache_quality import CacheTotals, Magnitudes, summarize
from jfp8kv.quality.data import Prompts, Windows, iterate_prompts, split_prompts
from jfp8kv.quality.keywords import CompareFields
from jfp8kv.quality.metrics import TokenScores, token_scores
from jfp8kv.quality.needle import Needle, allowed_lengths, create_needles
from jfp8kv.quality.observe import PAGE_SIZE
from jfp8kv.quality.options import CompareOptions
from jfp8kv.quality.quality_report import QualityReport
from jfp8kv.quality.quantization_stats import CacheStats, score_with_stats

MIN_CHUNK = 16

ScoredChunk: TypeAlias = tuple[range, tuple[Array, CacheStats]]
"""The positions of a chunk, their logits `[requests, tokens, vocab]`, and statistics."""


@takes(CompareOptions)
def compare(
    params: ModelLike,
    texts: Prompts,
    *,
    calibration: Prompts | None = None,
    progress: bool | None = None,
    **options: Unpack[CompareFields],
) -> QualityReport:
    """Compare KV caches with a float32 cache, on the same texts, through the engine.

    Measures the perplexity, KL divergence and top-1 agreement of each cache, the quantization error
    of keys and values by layer and head, recall of a needle in a haystack, and bytes per token.

        report = jfp8kv.compare(params, texts, kv_dtypes=["bfloat16", "fp8_e4m3"])
        print(report)
        report["fp8_e4m3 auto"].kl

    Args:
      params: a `Params`, or a path or hub id as for `load`.
      texts: as `prompts` of `generate`, or any iterable of such. Windows of one token are skipped.
      calibration: prompts to calibrate the scales 'tensor', 'head' and 'channel' on. They should
        differ from `texts`, or the result is optimistic.
      progress: show a progress bar; None shows one on a terminal.
      **options: the fields of `CompareOptions`, listed below.

    Returns:
      The quality of each cache. The float32 cache comes first.

    Raises:
      ConfigError, CheckpointError: unknown formats or scales, no texts, invalid texts, scales to
        calibrate without `calibration`. All are raised before the first text is run.
    """
    checked = CompareOptions.from_fields(also=("calibration", "progress"), **options)
    return run_comparison(params, texts, checked, calibration=calibration, progress=progress)


def run_comparison(
    params: ModelLike,
    texts: Prompts,
    options: CompareOptions,
    *,
    calibration: Prompts | None = None,
    progress: bool | None = None,
) -> QualityReport:
    """Return the result of `compare` with checked options."""
    params = as_params(params)
    use_compilation_cache()
    max_model_len = context_length(params.config, options.max_model_len)
    window = context_length(params.config, options.window or max_model_len)
    choices = cache_choices(params, options, max_model_len=max_model_len)
    lengths = allowed_lengths(options.needle_lengths, max_model_len)
    split = partial(split_prompts, params=params, max_model_len=max_model_len, window=window)
    prompts = _calibration_windows(split, choices, calibration)
    data, _ = iterate_prompts(texts, "texts")
    windows = [ids for each in _not_empty("texts", split(data, name="text")) for ids in each]
    scored = [ids for ids in windows if len(ids) > 1]
    if not scored:
        raise ConfigError("texts have no two consecutive tokens: there is nothing to predict.")
    corpus = np.concatenate([np.asarray(ids, np.int32) for ids in windows])
    needles = create_needles(corpus, lengths, options.needle_depths)
    choices = with_calibrated_scales(params, choices, prompts)
    max_tokens = max(map(len, [*scored, *(needle.ids for needle in needles)]))
    runs = _create_runs(params, choices, max_tokens=max_tokens, max_model_len=max_model_len)
    _run_all(runs, scored, needles, progress)
    baseline = runs[0].totals
    assert baseline.magnitudes is not None, "the baseline collects magnitudes"
    depths = tuple(options.needle_depths) if needles else ()
    return QualityReport(
        tokens=sum(map(len, scored)),
        sequences=len(scored),
        window=window,
        needle_lengths=lengths if needles else (),
        needle_depths=depths,
        caches=tuple(
            summarize(
                run.choice,
                run.engine.cache_config,
                run.totals,
                baseline,
                depths=len(depths),
                max_model_len=max_model_len,
            )
            for run in runs
        ),
        magnitudes=Magnitudes.of(baseline.magnitudes),
    )


@dataclasses.dataclass
class CacheRun:
    """A cache to compare: its engine and the sums so far."""

    choice: CacheChoice
    engine: Engine
    totals: CacheTotals
    is_baseline: bool  # the float32 cache, which also collects a histogram of magnitudes

    def run_chunks(self, ids: list[int]) -> Generator[ScoredChunk, None, None]:
        """Run a sequence chunk by chunk."""
        yield from run_chunks(self.engine, ids, score_with_stats, magnitudes=self.is_baseline)


def _calibration_windows(
    split: Callable[..., Iterator[Windows]],
    choices: Sequence[CacheChoice],
    calibration: Prompts | None,
) -> list[Windows]:
    """Return the windows to calibrate on, or no windows if no cache needs calibration."""
    uncalibrated = [choice.label for choice in choices if choice.calibrate is not None]
    if not uncalibrated:
        if calibration is not None:
            raise ConfigError(
                "calibration is given, but no cache uses it: add 'tensor', 'head' or 'channel' to "
                "kv_scales."
            )
        return []
    if calibration is None:
        raise ConfigError(
            f"{uncalibrated[0]}: these scales are calibrated, and calibration is None: give "
            "prompts to calibrate on."
        )
    data, _ = iterate_prompts(calibration, "calibration")
    return _not_empty("calibration", split(data, name="calibration prompt"))


def _not_empty(name: str, prompts: Iterable[Windows]) -> list[Windows]:
    found = list(prompts)
    if not found:
        raise ConfigError(f"{name} is empty: give at least one.")
    return found


def _create_runs(
    params: Params, choices: Sequence[CacheChoice], *, max_tokens: int, max_model_len: int
) -> list[CacheRun]:
    """Create an engine for each cache.

    Each is configured for `max_model_len`, because scales may depend on it, and has room for one
    sequence of `max_tokens` tokens.
    """
    scored = max(MIN_CHUNK, max_logits_tokens(params.config.vocab))
    chunk = min(default_prefill_chunk(), scored, max_tokens)
    runs: list[CacheRun] = []
    for choice in choices:
        config = resolve_cache(
            params,
            choice.kv_dtype,
            choice.kv_scales,
            page_size=PAGE_SIZE,
            max_tokens_per_dispatch=max_tokens_per_dispatch(chunk),
            max_model_len=max_model_len,
        )
        engine_options = EngineOptions(
            kv_dtype=choice.kv_dtype,
            kv_scales=choice.kv_scales,
            kv_cache_memory=config.sequence_bytes(max_tokens),
            max_model_len=max_model_len,
            max_num_seqs=1,
            max_num_batched_tokens=step_token_budget(chunk, 1),
            page_size=PAGE_SIZE,
        )
        weights = runs[0].engine.programs.weights if runs else None
        engine = Engine(params, engine_options, weights=weights)
        runs.append(CacheRun(choice, engine, CacheTotals(), is_baseline=not runs))
    return runs


def _run_all(
    runs: Sequence[CacheRun],
    sequences: Sequence[list[int]],
    needles: Sequence[Needle],
    progress: bool | None,
) -> None:
    from tqdm import tqdm

    total = (len(sequences) + len(needles)) * len(runs)
    with tqdm(total=total, unit="pass", disable=None if progress is None else not progress) as bar:
        for ids in sequences:
            _score_sequence(runs, ids)
            bar.update(len(runs))
        for needle in needles:
            for run in runs:
                run.totals.recall.append(_recall(run, needle))
                bar.update()


def _score_sequence(runs: Sequence[CacheRun], ids: list[int]) -> None:
    """Run one sequence through every cache, chunk by chunk, and add each chunk to the totals."""
    with ExitStack() as stack:
        chunks = [stack.enter_context(closing(run.run_chunks(ids))) for run in runs]
        for run in runs:
            run.totals.start_sequence()
        for positions, (base_logits, base_stats) in chunks[0]:
            predicted = min(positions.stop, len(ids) - 1) - positions.start
            next_ids = np.zeros(base_logits.shape[1], np.int32)
            next_ids[:predicted] = ids[positions.start + 1 : positions.start + 1 + predicted]
            for run, run_chunks in zip(runs, chunks, strict=True):
                logits, stats = base_logits, base_stats
                if not run.is_baseline:
                    _, (logits, stats) = next(run_chunks)
                scores = jax.device_get(_score_first_request(base_logits, logits, next_ids))
                if run.is_baseline:
                    _require_finite(scores, predicted)
                first_request = jax.tree.map(lambda x: x[0], jax.device_get(stats))
                run.totals.add(scores, first_request, predicted, len(positions))
                del logits


@jax.jit
def _score_first_request(base: Array, other: Array, next_ids: Array) -> TokenScores:
    return token_scores(base[0], other[0], next_ids)


@jax.jit
def _most_likely(logits: Array) -> Array:
    return jnp.argmax(logits[0], axis=-1)


def _require_finite(scores: TokenScores, predicted: int) -> None:
    if not np.all(np.isfinite(scores.nll[:predicted])):
        raise ConfigError(
            "the logits are not finite, even with a float32 cache: check the weights, or load them "
            "with dtype='float32'."
        )


def _recall(run: CacheRun, needle: Needle) -> float:
    """Return the fraction of the needle's tokens after the cue that were predicted correctly."""
    found = [
        np.asarray(_most_likely(logits))[: len(positions)]
        for positions, (logits, _) in run.run_chunks(needle.ids)
    ]
    predicted = np.concatenate(found)[needle.first - 1 : -1]
    return float(np.mean(predicted == needle.ids[needle.first :]))
