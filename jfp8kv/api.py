"""The functions of one line: `generate`, `logits`, `score`. Each keeps a warm `LLM` per model and cache setting behind it."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.prompts import as_list
from jfp8kv.engine.request import RequestOutput
from jfp8kv.llm import LLM
from jfp8kv.models.params import Params
from jfp8kv.sampling.params import SamplingParams

_ENGINES: "weakref.WeakKeyDictionary[Params, tuple[Any, LLM]]" = weakref.WeakKeyDictionary()


def generate(
    params: Params,
    prompts: Any,
    *,
    kv_dtype: str = "auto",
    kv_scales: Any = "auto",
    sampling: SamplingParams | None = None,
    progress: bool | None = None,
    **sampling_fields: Any,
) -> list[RequestOutput]:
    """Continue each prompt with the model in `params`; results in the order of `prompts`.

    Args:
      params: what `load` or `Params.from_pytree` gave.
      prompts: a str, a list of str, a list of token id lists, or chat messages (a list of dicts, or a list of those).
      kv_dtype: of the cache: "auto", "bfloat16", "float16", "float32", "fp8" (= "fp8_e4m3"), "fp8_e4m3", "fp8_e5m2".
      kv_scales: "auto", "checkpoint", "unit", "token_head", a `KVScales` or a path to one; see `LLM`.
      sampling: a `SamplingParams`; `sampling_fields` (`max_tokens=64, temperature=0.0, ...`) override its fields.
      progress: show a bar; None shows one for more than 8 prompts on a terminal.

    Raises `ConfigError` for anything that cannot be served, naming it, before anything runs.
    """
    llm = _llm(params, kv_dtype, kv_scales)
    return llm.generate(prompts, sampling, progress=progress, **sampling_fields)


def logits(params: Params, token_ids: Sequence[int], *, kv_dtype: str = "auto", kv_scales: Any = "auto") -> np.ndarray:
    """float32 `[tokens, vocab]`: the model's scores after each token, through the paged cache by the code that generates."""
    return _llm(params, kv_dtype, kv_scales).logits(token_ids)


def score(
    params: Params, texts_or_token_ids: Any, *, kv_dtype: str = "auto", kv_scales: Any = "auto"
) -> list[np.ndarray] | np.ndarray:
    """Log-probability of each token given those before it, float32 `[tokens - 1]` (the first token has none).

    A list of texts (or of token id lists) gives a list of arrays; one text (or one list of ids) gives one array.
    """
    llm = _llm(params, kv_dtype, kv_scales)
    texts = as_list(texts_or_token_ids)
    scores = [llm.score(text) for text in texts]
    single = isinstance(texts_or_token_ids, str) or (len(texts) == 1 and texts[0] is texts_or_token_ids)
    return scores[0] if single else scores


def _llm(params: Params, kv_dtype: str, kv_scales: Any) -> LLM:
    """The warm engine of these parameters, made anew when the cache's settings change."""
    if not isinstance(params, Params):
        raise ConfigError(
            f"params of type {type(params).__name__}: must be a Params; make one with jfp8kv.load(path) or "
            "Params.from_pytree(tree, config)."
        )
    settings, llm = _ENGINES.get(params, (None, None))
    wanted = (kv_dtype, kv_scales if isinstance(kv_scales, str) else id(kv_scales))
    if llm is None or settings != wanted:
        _ENGINES.pop(params, None)
        llm = LLM(params, kv_cache_dtype=kv_dtype, kv_scales=kv_scales)
        _ENGINES[params] = (wanted, llm)
    return llm
