"""`SamplingParams` as the device sees them: scalars of one request, stacked into rows of a batch.

The ids of `logit_bias` and of the tokens that `min_tokens` holds off have as many entries as the request names. They
are padded to a bucket (0, or a power of two from 8) with an id past the end of any vocabulary, so that few shapes
occur and a batch without them carries none.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from jfp8kv.core.pytree import pytree
from jfp8kv.sampling.params import MAX_ID, SamplingParams

PAST_THE_END = np.int32(MAX_ID)
COLDEST = 1e-5  # a logit gap of 0.001 is then a factor of e**100: greedy in all but name


@pytree
class SamplerSettings:
    """The settings of one request, or of several with a leading axis `requests`.

    `temperature` 0 is greedy, `top_k` 0 keeps every token. `key` is `keys.request_key`. While fewer than `min_tokens`
    tokens exist, `held_ids` cannot be picked.
    """

    temperature: Float32[Array | np.ndarray, "*requests"]
    top_k: Int32[Array | np.ndarray, "*requests"]
    top_p: Float32[Array | np.ndarray, "*requests"]
    min_p: Float32[Array | np.ndarray, "*requests"]
    repetition_penalty: Float32[Array | np.ndarray, "*requests"]
    presence_penalty: Float32[Array | np.ndarray, "*requests"]
    frequency_penalty: Float32[Array | np.ndarray, "*requests"]
    min_tokens: Int32[Array | np.ndarray, "*requests"]
    key: UInt32[Array | np.ndarray, "*requests 2"]
    bias_ids: Int32[Array | np.ndarray, "*requests biased"]
    bias_values: Float32[Array | np.ndarray, "*requests biased"]
    held_ids: Int32[Array | np.ndarray, "*requests held"]


def settings_from(
    params: SamplingParams, key: UInt32[np.ndarray, "2"], *, eos_ids: Iterable[int] = ()
) -> SamplerSettings:
    """The settings of one request, as NumPy arrays. `eos_ids`: the model's own end-of-sequence tokens."""
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
    bias = params.logit_bias or {}
    held = sorted(ends) if params.min_tokens > 0 else []
    return SamplerSettings(
        temperature=np.asarray(
            params.temperature if params.temperature >= COLDEST else 0, np.float32
        ),
        top_k=np.asarray(np.clip(params.top_k, 0, PAST_THE_END), np.int32),
        top_p=np.asarray(params.top_p, np.float32),
        min_p=np.asarray(params.min_p, np.float32),
        repetition_penalty=np.asarray(params.repetition_penalty, np.float32),
        presence_penalty=np.asarray(params.presence_penalty, np.float32),
        frequency_penalty=np.asarray(params.frequency_penalty, np.float32),
        min_tokens=np.asarray(min(params.min_tokens, PAST_THE_END), np.int32),
        key=key,
        bias_ids=_padded(np.array(list(bias), np.int32), bucket(len(bias)), PAST_THE_END),
        bias_values=_padded(np.array(list(bias.values()), np.float32), bucket(len(bias)), 0),
        held_ids=_padded(np.array(held, np.int32), bucket(len(held)), PAST_THE_END),
    )


def stack_settings(
    settings: Sequence[SamplerSettings], *, rows: int | None = None, biased: int = 0, held: int = 0
) -> SamplerSettings:
    """The batch of `settings`, one row each; `rows` pads it with greedy rows. Id lists grow to the widest bucket, and to no
    fewer than `biased` and `held` entries."""
    settings = [*settings, *[_IDLE] * ((rows or 0) - len(settings))]
    biased = max(biased, *(s.bias_ids.shape[0] for s in settings))
    held = max(held, *(s.held_ids.shape[0] for s in settings))
    same = [_widened(s, biased=biased, held=held) for s in settings]
    return SamplerSettings(
        *(
            np.stack([getattr(s, field.name) for s in same])
            for field in dataclasses.fields(SamplerSettings)
        )
    )


def bucket(count: int) -> int:
    """The padded length of `count` ids: 0, or the next power of two from 8."""
    return 0 if count == 0 else max(8, 1 << (count - 1).bit_length())


def _widened(s: SamplerSettings, *, biased: int, held: int) -> SamplerSettings:
    if s.bias_ids.shape[0] == biased and s.held_ids.shape[0] == held:
        return s
    return dataclasses.replace(
        s,
        bias_ids=_padded(s.bias_ids, biased, PAST_THE_END),
        bias_values=_padded(s.bias_values, biased, 0),
        held_ids=_padded(s.held_ids, held, PAST_THE_END),
    )


def _padded(values: Any, width: int, fill: Any) -> np.ndarray:
    return np.concatenate([values, np.full(width - len(values), fill, values.dtype)])


_IDLE = settings_from(SamplingParams(temperature=0.0), np.zeros(2, np.uint32))  # of a padding row
