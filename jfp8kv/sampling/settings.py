"""`SamplingParams` on the device: scalars of one request, stacked into rows of a batch.

The token ids of `logit_bias` and `min_tokens` have a variable number of entries. They are padded to
a bucket (0, or a power of two from 8) with an id past the end of any vocabulary, so that few shapes
occur and a batch without them has empty arrays.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from jfp8kv.core.pytree import AnyArray, pytree
from jfp8kv.sampling.params import MAX_ID, SamplingParams

PAST_THE_END = np.int32(MAX_ID)
# Smaller temperatures are treated as 0: with them, logits that differ by 0.001 have probabilities
# that differ by a factor of e**100.
MIN_TEMPERATURE = 1e-5


@pytree
class SamplerSettings:
    """The settings of one request, or of several with a leading axis `requests`.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is all tokens.
      key: see `rng.request_key`.
      bias_ids, bias_values: the token ids of `logit_bias` and the values added to their logits.
      min_tokens_ids: the token ids that are masked while the output has fewer than `min_tokens`.
    """

    temperature: Float32[AnyArray, "*requests"]
    top_k: Int32[AnyArray, "*requests"]
    top_p: Float32[AnyArray, "*requests"]
    min_p: Float32[AnyArray, "*requests"]
    repetition_penalty: Float32[AnyArray, "*requests"]
    presence_penalty: Float32[AnyArray, "*requests"]
    frequency_penalty: Float32[AnyArray, "*requests"]
    min_tokens: Int32[AnyArray, "*requests"]
    key: UInt32[AnyArray, "*requests 2"]
    bias_ids: Int32[AnyArray, "*requests biased"]
    bias_values: Float32[AnyArray, "*requests biased"]
    min_tokens_ids: Int32[AnyArray, "*requests masked"]


def settings_from(
    params: SamplingParams, key: UInt32[np.ndarray, "2"], *, eos_ids: Iterable[int] = ()
) -> SamplerSettings:
    """Return the settings of one request, as NumPy arrays.

    `eos_ids` are the end-of-sequence tokens of the model.
    """
    end_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
    masked = sorted(end_ids) if params.min_tokens > 0 else []
    bias = params.logit_bias or {}
    temperature = params.temperature if params.temperature >= MIN_TEMPERATURE else 0
    return SamplerSettings(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(np.clip(params.top_k, 0, PAST_THE_END), np.int32),
        top_p=np.asarray(params.top_p, np.float32),
        min_p=np.asarray(params.min_p, np.float32),
        repetition_penalty=np.asarray(params.repetition_penalty, np.float32),
        presence_penalty=np.asarray(params.presence_penalty, np.float32),
        frequency_penalty=np.asarray(params.frequency_penalty, np.float32),
        min_tokens=np.asarray(min(params.min_tokens, PAST_THE_END), np.int32),
        key=key,
        bias_ids=_pad(np.array(list(bias), np.int32), bucket(len(bias)), PAST_THE_END),
        bias_values=_pad(np.array(list(bias.values()), np.float32), bucket(len(bias)), 0),
        min_tokens_ids=_pad(np.array(masked, np.int32), bucket(len(masked)), PAST_THE_END),
    )


def stack_settings(
    settings: Sequence[SamplerSettings],
    *,
    rows: int | None = None,
    biased: int = 0,
    masked: int = 0,
) -> SamplerSettings:
    """Return the settings of a batch, one request per row.

    Args:
      settings: the settings of each request.
      rows: the number of rows; padding rows are greedy.
      biased: the minimum length of the `logit_bias` arrays. Longer ones set the length.
      masked: the minimum length of the `min_tokens` array, likewise.
    """
    padded = [*settings, *[_PADDING_ROW] * ((rows or 0) - len(settings))]
    biased = max(biased, *(row.bias_ids.shape[0] for row in padded))
    masked = max(masked, *(row.min_tokens_ids.shape[0] for row in padded))
    widened = [_widen(row, biased=biased, masked=masked) for row in padded]
    return SamplerSettings(
        **{
            field.name: np.stack([getattr(row, field.name) for row in widened])
            for field in dataclasses.fields(SamplerSettings)
        }
    )


def bucket(count: int) -> int:
    """Return the padded length of `count` ids: 0, or the next power of two from 8."""
    return 0 if count == 0 else max(8, 1 << (count - 1).bit_length())


def _widen(settings: SamplerSettings, *, biased: int, masked: int) -> SamplerSettings:
    if settings.bias_ids.shape[0] == biased and settings.min_tokens_ids.shape[0] == masked:
        return settings
    return dataclasses.replace(
        settings,
        bias_ids=_pad(settings.bias_ids, biased, PAST_THE_END),
        bias_values=_pad(settings.bias_values, biased, 0),
        min_tokens_ids=_pad(settings.min_tokens_ids, masked, PAST_THE_END),
    )


def _pad(values: Array | np.ndarray, width: int, fill: np.int32 | int) -> np.ndarray:
    return np.concatenate([values, np.full(width - len(values), fill, values.dtype)])


_PADDING_ROW = settings_from(SamplingParams(temperature=0.0), np.zeros(2, np.uint32))
