"""From logits to tokens: what a request asks for, and pure functions that answer it.

`params` is the user's side (checked on the host), `settings` the same as device scalars, one row per request. `keys`
makes the random numbers, `adjust` edits logits (bias, penalties, min_tokens), `filters` finds the cut of top-k, top-p
and min-p, `sample` puts them together. Everything on the device is written for one request and batched with `vmap`.
"""

from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.sample import logprob_at, sample, sample_batch, top_logprobs
from jfp8kv.sampling.settings import SamplerSettings, settings_from, stack_settings

__all__ = [
    "SamplerSettings",
    "SamplingParams",
    "logprob_at",
    "sample",
    "sample_batch",
    "settings_from",
    "stack_settings",
    "top_logprobs",
]
