"""Functions that take a model: `generate`, `logits` and `score`. They reuse an `LLM` for each model
and cache."""

from typing import Any, Unpack

import numpy as np

from jfp8kv.cache.capacity import default_bytes  # noqa: F401  (for batch runs)
from jfp8kv.cache.config import resolve_plan
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.export import LAYOUTS as EXPORT_LAYOUTS  # noqa: F401  (for the command line)
from jfp8kv.checkpoint.export import export as export
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.checkpoint.load import load as load
from jfp8kv.core.options import takes
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.sizes import parse_bytes as parse_bytes  # for batch runs
from jfp8kv.engine.buckets import (
    Buckets as Buckets,  # for batch runs, as `StructuredOutput` and `encode_pair`
)
from jfp8kv.engine.options import KVDtype, KVScalesLike
from jfp8kv.engine.request import RequestOutput
from jfp8kv.engine.structured import StructuredOutput as StructuredOutput
from jfp8kv.llm import LLM
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
