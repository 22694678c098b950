"""`generate`, `logits` and `score` as functions of a model.

They run on an `LLM` that is created at the first call and reused: see engine_registry.py.
"""

from typing import Unpack, overload

import numpy as np

from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.options import takes
from jfp8kv.engine.options import KVDtype, KVScalesLike
from jfp8kv.engine.request import RequestOutput
from jfp8kv.engine_registry import engine_for
from jfp8kv.request_group import GenerateFields
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.chat import ChatOptions, split_fields
from jfp8kv.text.prompts import (
    OnePrompt,
    PromptLike,
    SeveralPrompts,
    TokenIds,
    as_list,
    with_chat_options,
)


@takes(SamplingParams, ChatOptions)
def generate(
    params: ModelLike,
    prompts: PromptLike,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
    prompt_lookup: int = 0,
    sampling_params: SamplingParams | None = None,
    progress: bool | None = None,
    **fields: Unpack[GenerateFields],
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
      progress: show a progress bar; None shows one on a terminal for more than 8 prompts.
      **fields: fields of `SamplingParams`, which override those of `sampling_params`, and of
        `ChatOptions`, for chat messages.

    Returns:
      One output for each prompt, in the order of `prompts`.

    Raises:
      ConfigError: an invalid prompt or option. Nothing has run then.
      CheckpointError: a model that cannot be loaded.
      Other errors are those of `LLM` and `LLM.generate`.
    """
    chat, sampling_fields = split_fields(fields)
    keywords = ("kv_dtype", "kv_scales", "prompt_lookup", "sampling_params", "progress")
    also = (*keywords, *ChatOptions.names())
    sampling = SamplingParams.from_fields(sampling_params, also=also, **sampling_fields)
    listed = with_chat_options(as_list(prompts), chat)
    llm = engine_for(
        as_params(params), kv_dtype=kv_dtype, kv_scales=kv_scales, prompt_lookup=prompt_lookup
    )
    return llm.generate(listed, sampling, progress=progress)


def logits(
    params: ModelLike,
    token_ids: TokenIds,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
) -> np.ndarray:
    """Return the logits after each token, float32 `[tokens, vocab]`.

    They are computed over the paged KV cache by the steps that `generate` runs.

        jfp8kv.logits(params, [1, 15, 7], kv_dtype="fp8")[-1].argmax()  # the most likely next token

    Args:
      params: a `Params`, or a path or hub id, which is then loaded at each call.
      token_ids: a sequence of token ids, such as a list or a 1-D integer array.
      kv_dtype, kv_scales: the KV cache, as in `EngineOptions`.

    Raises:
      ConfigError: an empty sequence, an id outside the vocabulary, or an invalid option.
      CapacityError: a sequence that exceeds the context length or the KV cache.
    """
    llm = engine_for(as_params(params), kv_dtype=kv_dtype, kv_scales=kv_scales)
    return llm.logits(token_ids)


@overload  # a str is a Sequence[str] too
def score(  # type: ignore[overload-overlap]
    params: ModelLike,
    texts_or_token_ids: OnePrompt,
    *,
    kv_dtype: KVDtype = ...,
    kv_scales: KVScalesLike = ...,
) -> np.ndarray: ...


@overload
def score(
    params: ModelLike,
    texts_or_token_ids: SeveralPrompts,
    *,
    kv_dtype: KVDtype = ...,
    kv_scales: KVScalesLike = ...,
) -> list[np.ndarray]: ...


@overload
def score(
    params: ModelLike,
    texts_or_token_ids: PromptLike,
    *,
    kv_dtype: KVDtype = ...,
    kv_scales: KVScalesLike = ...,
) -> list[np.ndarray] | np.ndarray: ...


def score(
    params: ModelLike,
    texts_or_token_ids: PromptLike,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
) -> list[np.ndarray] | np.ndarray:
    """Return the log-probability of each token but the first, given the tokens before it.

        perplexity = np.exp(-jfp8kv.score(params, "The sky is blue.", kv_dtype="fp8").mean())

    Args:
      params: a `Params`, or a path or hub id, which is then loaded at each call.
      texts_or_token_ids: one prompt or several, as for `generate`.
      kv_dtype, kv_scales: the KV cache, as in `EngineOptions`.

    Returns:
      Float32 `[tokens - 1]` for one prompt, or a list of such arrays.

    Raises:
      ConfigError: an invalid prompt or option, or a prompt of a single token.
      CapacityError: a prompt that exceeds the context length or the KV cache.
    """
    llm = engine_for(as_params(params), kv_dtype=kv_dtype, kv_scales=kv_scales)
    return llm.score(texts_or_token_ids)
