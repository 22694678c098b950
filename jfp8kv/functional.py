"""Functions that take a model: `generate`, `logits`, `score`, `calibrate`, `compare`, `plan_kv` and
`inspect`. The first three reuse an `LLM` for each model and cache."""

import os
from collections.abc import Sequence
from inspect import signature
from typing import Any, Unpack

import numpy as np

from jfp8kv.cache.capacity import default_bytes  # noqa: F401  (for batch runs)
from jfp8kv.cache.config import resolve_plan
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.export import LAYOUTS as EXPORT_LAYOUTS  # noqa: F401  (for the command line)
from jfp8kv.checkpoint.export import export as export
from jfp8kv.checkpoint.load import ModelLike, as_params, read_checkpoint_info
from jfp8kv.checkpoint.load import load as load
from jfp8kv.core.errors import ConfigError, unknown_keyword
from jfp8kv.core.options import takes
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.sizes import parse_bytes as parse_bytes  # for batch runs
from jfp8kv.engine.buckets import (
    Buckets as Buckets,  # for batch runs, as `StructuredOutput` and `encode_pair`
)
from jfp8kv.engine.options import EngineOptions, KVDtype, KVScalesLike
from jfp8kv.engine.request import RequestOutput
from jfp8kv.engine.structured import StructuredOutput as StructuredOutput
from jfp8kv.llm import LLM, use_compilation_cache
from jfp8kv.models.params import Params
from jfp8kv.quality.bench import bench as bench
from jfp8kv.quality.calibrate import Calibration as Calibration
from jfp8kv.quality.calibrate import calibration
from jfp8kv.quality.calibration_options import Plan as CalibrationPlan  # noqa: F401  (for the command line)
from jfp8kv.quality.calibration_options import plan as calibration_plan
from jfp8kv.quality.compare import comparison
from jfp8kv.quality.compare_options import USUAL_DTYPES, USUAL_SCALES
from jfp8kv.quality.compare_options import plan as comparison_plan
from jfp8kv.quality.mixed_precision import planned
from jfp8kv.quality.model_report import ModelReport, report
from jfp8kv.quality.needle import DEPTHS
from jfp8kv.quality.quality_report import QualityReport
from jfp8kv.sampling.keywords import SamplingFields
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.prompts import PromptLike, TokenIds
from jfp8kv.text.prompts import encode_pair as encode_pair

_ENGINE = "_engine"  # where a `Params` keeps its warm engine


@takes(SamplingParams)
def generate(
    params: ModelLike,
    prompts: PromptLike,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
    prompt_lookup: int = 0,
    sampling_params: SamplingParams | None = None,
    progress: bool | None = None,
    **sampling_fields: Unpack[SamplingFields],
) -> list[RequestOutput]:
    """Generate a continuation of each prompt.

        outputs = jfp8kv.generate(params, ["Once upon a time"], kv_dtype="fp8", max_tokens=64)
        outputs[0].text

    Args:
      params: a `Params`, or a path or hub id, which is then loaded at each call.
      prompts: a str, a list of str, a list of token id lists, or chat messages (a list of dicts, or
        a list of those).
      kv_dtype: format of the KV cache, as in `EngineOptions`.
      kv_scales: scales of an FP8 cache, as in `EngineOptions`.
      prompt_lookup: draft tokens per step of prompt-lookup decoding, as in `EngineOptions`.
      sampling_params: sampling parameters of all prompts.
      progress: whether to show a progress bar; None shows one on a terminal for more than 8 prompts.
      **sampling_fields: fields of `SamplingParams`. They override those of `sampling_params`.

    Returns:
      One output for each prompt, in the order of `prompts`.

    Raises:
      ConfigError: an invalid prompt or option. Nothing has run then.
    """
    also = ("kv_dtype", "kv_scales", "prompt_lookup", "sampling_params", "progress")
    sampling = SamplingParams.from_fields(sampling_params, also=also, **sampling_fields)
    llm = _llm(params, kv_dtype, kv_scales, prompt_lookup)
    return llm.generate(prompts, sampling, progress=progress)


def logits(
    params: ModelLike,
    token_ids: TokenIds,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
) -> np.ndarray:
    """Return the logits after each token, float32 `[tokens, vocab]`.

    They are computed through the paged cache, by the code that generates. Arguments are those of
    `generate`.
    """
    return _llm(params, kv_dtype, kv_scales).logits(token_ids)


def score(
    params: ModelLike,
    texts_or_token_ids: PromptLike,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
) -> list[np.ndarray] | np.ndarray:
    """Return the log-probability of each token but the first, float32 `[tokens - 1]`.

    One text (or one list of token ids) gives an array, a list of them a list of arrays. Other
    arguments are those of `generate`.
    """
    return _llm(params, kv_dtype, kv_scales).score(texts_or_token_ids)


def calibrate(
    params: Params,
    prompts: Any,
    *,
    kv_dtype: str = "fp8_e4m3",
    granularity: str = "head",
    observer: str = "amax",
    percentile: float | None = None,
    window: int | None = None,
    max_model_len: int | None = None,
    k_offset: bool = False,
    headroom: float = 1.0,
    progress: bool | None = None,
    **unknown: Any,
) -> KVScales:
    """Static scales for an FP8 cache, from the keys (after RoPE) and values of all of `prompts`.

    The same prompts in any order give the same scales. Memory does not grow with their number: an iterable is taken one by one.

    Args:
      params: what `load` or `Params.from_pytree` gave.
      prompts: as for `generate`, or any iterable of such prompts.
      kv_dtype: the format the scales are for: "fp8_e4m3" (or "fp8") or "fp8_e5m2".
      granularity: what shares a scale in a layer: "tensor" (all of K, all of V), "head" (a KV head) or "channel".
      observer: "amax": the largest magnitude seen becomes the largest finite value. "percentile": the same of the magnitude
        that `percentile` % of the values do not exceed, up to a factor of 33/32 (quality/observers.py). "mse": of 25
        candidates from that of "amax" down to an eighth of it, the one of least squared error; goes over the data twice.
      percentile: for that observer, above 0 and up to 100; None is 99.99.
      window: cut prompts into pieces of this many tokens, each a text of its own; None takes them whole.
      max_model_len: most tokens of a prompt or a piece; None is what the model was trained for.
      k_offset: also find what is constant of the keys, channel by channel, and store keys without it; for models with large K
        biases (quality/key_offsets.py). Goes with observer "amax" and over the data twice. The scales allow for positions up
        to `max_model_len`.
      headroom: for observer "amax": the scales hold so many times the largest magnitude seen, at least 1. Other texts bring
        larger values than the prompts did, and those are clipped; 2 takes no precision from a value that is not tiny.
      progress: show a bar; None shows one on a terminal, unless there are 8 prompts or fewer.

    What saw nothing but zeros gets scale 1. Raises `ConfigError`: no prompts, or one that is empty, too long or no prompt; an
    unknown format, granularity or observer; a value out of range; NaN or infinity among the keys or values of a layer.
    """
    for name in unknown:
        raise unknown_keyword(name, list(signature(calibrate).parameters)[2:-1])
    _require_params(params)
    asked = calibration_plan(
        kv_dtype=kv_dtype,
        granularity=granularity,
        observer=observer,
        percentile=percentile,
        window=window,
        max_model_len=max_model_len,
        k_offset=k_offset,
        headroom=headroom,
    )
    use_compilation_cache()
    return calibration(params, prompts, asked, progress=progress).scales


def compare(
    params: Params,
    texts: Any,
    *,
    kv_dtypes: Any = USUAL_DTYPES,
    kv_scales: Any = USUAL_SCALES,
    calibration: Any = None,
    window: int | None = None,
    needle_lengths: Sequence[int] | None = None,
    needle_depths: Sequence[float] = DEPTHS,
    max_model_len: int | None = None,
    progress: bool | None = None,
    **unknown: Any,
) -> QualityReport:
    """What caches cost in quality: each against a float32 cache of the same weights, over the same texts, through the engine.

    Of every cache: perplexity, KL divergence and agreement with the float32 one, how well keys and values are kept by layer and
    head, recall of a needle in a haystack, bytes per token. The report prints as tables; `report.plot()`, `report.to_dict()`.

    Args:
      params: what `load` or `Params.from_pytree` gave.
      texts: as `prompts` of `generate`, or any iterable of such. Texts of one token predict nothing and count for nothing.
      kv_dtypes: formats, each as `kv_dtype` of `generate`: names, formats by layer, a `KVPlan` with its own scales. A dict
        `{label: kv_dtype}` names them. The float32 cache comes first whether named or not.
      kv_scales: for each format that is FP8: "auto", "unit", "token_head", "checkpoint", a `KVScales` or a path to one; or
        "tensor", "head" or "channel": found on `calibration`, by amax, for the format at hand. A dict `{label: scales}` names
        them, and so do pairs `(label, KVScales)` among the others; pairs do for `kv_dtypes` that are no text, too.
      calibration: prompts to find such scales on, cut like `texts`; not those of `texts`, or the result flatters.
      window: cut texts into pieces of this many tokens, each a text of its own; None is `max_model_len`.
      needle_lengths: tokens of the haystacks, each run once for every depth; None is 256 and 1024, as far as the model takes
        them, () leaves the task out.
      needle_depths: where the needle is, from 0, the beginning, to 1, the end.
      max_model_len: most tokens of a piece; None is what the model was trained for.
      progress: show a bar; None shows one on a terminal.

    Raises `ConfigError` or `CheckpointError` for what cannot be, before anything runs: unknown formats or scales, no texts,
    ones that are no prompts, calibrated scales without prompts to find them on.
    """
    for name in unknown:
        raise unknown_keyword(name, list(signature(compare).parameters)[2:-1])
    _require_params(params)
    asked = comparison_plan(
        kv_dtypes=kv_dtypes,
        kv_scales=kv_scales,
        window=window,
        needle_lengths=needle_lengths,
        needle_depths=needle_depths,
        max_model_len=max_model_len,
    )
    use_compilation_cache()
    return comparison(params, texts, asked, calibration=calibration, progress=progress)


def plan_kv(
    params: Params,
    texts: Any,
    *,
    budget: float | str | None = None,
    max_loss: float | None = None,
    kv_dtypes: Sequence[str] = ("bfloat16", "fp8_e4m3"),
    window: int | None = None,
    max_model_len: int | None = None,
    progress: bool | None = None,
    **unknown: Any,
) -> KVPlan:
    """Choose what each layer keeps: the least loss within a budget of bytes, or the fewest bytes within a budget of loss.

    Loss is KL divergence from the unquantized cache, in nats per token. It is measured on every second piece of `texts`, for
    each layer kept in each way while the others are not quantized, and then for the choice as a whole; scales come from the
    other pieces. The ways are `kv_dtypes`, FP8 with scale 1, scales per head, per channel or per token and head, the last two
    also with K offsets. That takes (layers x ways) passes over half of the texts: a few thousand tokens do.

    Args:
      params: what `load` or `Params.from_pytree` gave.
      texts: as for `generate`, or any iterable of such.
      budget: bytes per token, as in `llm.stats`: 2048, "2KiB", or "60%" of what bfloat16 takes.
      max_loss: nats per token, instead of a budget.
      kv_dtypes: the formats to choose from.
      window: tokens of a piece; None is 512.
      max_model_len: the longest text that is meant: layers with windows cost less in longer ones, and scales must allow for its
        positions. None is what the model was trained for.
      progress: show a bar; None shows one on a terminal.

    Returns a `KVPlan`: give it as `kv_dtype` to `generate` or `LLM`, print it, save it. Raises `ConfigError` for budgets that
    nothing meets, saying what could be had.
    """
    for name in unknown:
        raise unknown_keyword(name, list(signature(plan_kv).parameters)[2:-1])
    _require_params(params)
    use_compilation_cache()
    return planned(
        params,
        texts,
        budget=budget,
        max_loss=max_loss,
        kv_dtypes=kv_dtypes,
        window=window,
        max_model_len=max_model_len,
        progress=progress,
    )


def inspect(
    model: ModelLike,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
    max_model_len: int | None = None,
    page_size: int = 64,
) -> ModelReport:
    """Report what a model is, what its KV cache costs in each format, and the state of its KV scales.

    The weights are not read, and only the small files of a hub model are fetched. Invalid scales are
    part of the report; they do not raise.

    Args:
      model: a `Params`, a path or a hub id. A folder may lack its weights.
      kv_dtype, kv_scales, max_model_len, page_size: as in `EngineOptions`. The report has the figures
        of `LLM.stats` for them, besides those of the usual formats.

    Raises:
      CheckpointError, ConfigError: a model that cannot be loaded, or options that it does not allow.
    """
    options = EngineOptions(
        kv_dtype=kv_dtype, kv_scales=kv_scales, max_model_len=max_model_len, page_size=page_size
    )
    cache = {
        "kv_dtype": options.kv_dtype,
        "kv_scales": options.kv_scales,
        "max_model_len": options.max_model_len,
        "page_size": options.page_size,
    }
    if isinstance(model, Params):
        return report(model, "Params", **cache)
    return report(read_checkpoint_info(model, weights=False), os.fspath(model), **cache)


def _llm(params: ModelLike, kv_dtype: Any, kv_scales: Any, prompt_lookup: int | None = None) -> LLM:
    """The warm engine of these parameters, made anew when the settings change (None: whatever `prompt_lookup` it has).

    It belongs to `params` and goes with them. Scales and plans from files are read each time: what counts is what they are now.
    """
    params = as_params(params)
    kv_dtype = resolve_plan(kv_dtype) or kv_dtype
    if looks_like_path(kv_scales):
        kv_scales = KVScales.load(kv_scales)
    settings, llm = params.__dict__.get(_ENGINE, (None, None))
    if prompt_lookup is None:
        prompt_lookup = settings[2] if settings else 0
    wanted = (kv_dtype, kv_scales, prompt_lookup)
    if settings is None or not all(map(_same, settings, wanted)):
        params.__dict__.pop(_ENGINE, None)  # its pool is freed before the next one is made
        llm = LLM(params, kv_dtype=kv_dtype, kv_scales=kv_scales, prompt_lookup=prompt_lookup)
        params.__dict__[_ENGINE] = (wanted, llm)
    return llm


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal: the same names, or scales with the same numbers."""
    if isinstance(a, KVScales) and isinstance(b, KVScales):
        return (
            a.kv_dtype == b.kv_dtype
            and a.arrays.keys() == b.arrays.keys()
            and all(np.array_equal(value, b.arrays[name]) for name, value in a.arrays.items())
        )
    if isinstance(a, KVPlan) and isinstance(b, KVPlan):
        return a.layers == b.layers and _same(a.scales, b.scales)
    return type(a) is type(b) and a == b


def _require_params(params: Any) -> None:
    if not isinstance(params, Params):
        raise ConfigError(
            f"params of type {type(params).__name__}: must be a Params; make one with jfp8kv.load(path) or "
            "Params.from_pytree(tree, config)."
        )
