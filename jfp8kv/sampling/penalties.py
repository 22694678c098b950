"""Edits of the logits before anything is chosen: bias, penalties, and the tokens that `min_tokens` holds off.

Penalties need to know what came before: how often each token stands in the prompt and in the output so far. Those
counts are `[vocab]` per request, so they are optional: a batch in which nobody asks for a penalty passes None and
pays nothing. What a grammar lets come next is applied last, and only where there is one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jfp8kv.sampling.settings import SamplerSettings


def adjust(
    logits: Float32[Array, " vocab"],
    settings: SamplerSettings,
    position: Int32[Array, ""],
    prompt_counts: Int32[Array, " vocab"] | None = None,
    output_counts: Int32[Array, " vocab"] | None = None,
) -> Float32[Array, " vocab"]:
    """The logits to choose from. `position` is the number of tokens in the output so far.

    Order: bias, repetition penalty (over prompt and output), presence and frequency penalty (over the output),
    min_tokens. Without counts, penalties do not act. A logit of -inf stays -inf.
    """
    logits = logits.at[settings.bias_ids].add(settings.bias_values, mode="drop")
    if prompt_counts is not None or output_counts is not None:
        logits = _penalized(
            logits, settings, _or_zero(prompt_counts, logits), _or_zero(output_counts, logits)
        )
    held = jnp.where(position < settings.min_tokens, -jnp.inf, jnp.inf)
    return logits.at[settings.held_ids].min(held, mode="drop")


def allow(
    logits: Float32[Array, " vocab"], allowed: UInt32[Array, " words"]
) -> Float32[Array, " vocab"]:
    """The logits of the tokens whose bit is set, -inf for the others: token i's is bit i % 32 of word i // 32."""
    bits = (allowed[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(-1)[: logits.shape[0]] == 1, logits, -jnp.inf)


def _penalized(
    logits: Float32[Array, " vocab"],
    settings: SamplerSettings,
    prompt_counts: Int32[Array, " vocab"],
    output_counts: Int32[Array, " vocab"],
) -> Float32[Array, " vocab"]:
    rate = settings.repetition_penalty
    seen = prompt_counts + output_counts > 0
    logits = jnp.where(seen, jnp.where(logits > 0, logits / rate, logits * rate), logits)
    present = jnp.where(output_counts > 0, settings.presence_penalty, 0)
    return logits - present - settings.frequency_penalty * output_counts.astype(jnp.float32)


def _or_zero(
    counts: Int32[Array, " vocab"] | None, logits: Float32[Array, " vocab"]
) -> Int32[Array, " vocab"]:
    return jnp.zeros(logits.shape, jnp.int32) if counts is None else counts


def count_token(
    counts: Int32[Array, " vocab"], token: Int32[Array, "*tokens"]
) -> Int32[Array, " vocab"]:
    """`counts` with one more `token`, or with several, those past the last id dropped."""
    return counts.at[token].add(1, mode="drop")
