"""Edits of the logits before sampling: bias, penalties, `min_tokens` and the token bitmask.

Penalties need the number of times each token occurs in the prompt and in the output. These counts
are `[vocab]` per request and optional: a batch without penalties passes None. The
bitmask of structured output is applied last.
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
    """Return the logits to sample from.

    The order is bias, repetition penalty (of prompt and output tokens), presence and frequency
    penalty (of output tokens), min_tokens. A logit of -inf stays -inf.

    Args:
      logits: the model's logits.
      settings: the settings of one request.
      position: the number of tokens in the output so far.
      prompt_counts: occurrences of each token in the prompt.
      output_counts: occurrences of each token in the output. Without both counts, penalties do not
        apply.
    """
    logits = logits.at[settings.bias_ids].add(settings.bias_values, mode="drop")
    if prompt_counts is not None or output_counts is not None:
        zeros = jnp.zeros(logits.shape, jnp.int32)
        logits = _penalized(
            logits,
            settings,
            zeros if prompt_counts is None else prompt_counts,
            zeros if output_counts is None else output_counts,
        )
    limit = jnp.where(position < settings.min_tokens, -jnp.inf, jnp.inf)
    return logits.at[settings.min_tokens_ids].min(limit, mode="drop")


def apply_token_bitmask(
    logits: Float32[Array, " vocab"], bitmask: UInt32[Array, " words"]
) -> Float32[Array, " vocab"]:
    """Return the logits of the tokens whose bit is set, and -inf for the others.

    The bit of token i is bit i % 32 of word i // 32.
    """
    bits = (bitmask[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
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
    presence = jnp.where(output_counts > 0, settings.presence_penalty, 0)
    frequency = jnp.asarray(settings.frequency_penalty) * output_counts.astype(jnp.float32)
    return logits - presence - frequency


def count_token(
    counts: Int32[Array, " vocab"], token: Int32[Array, "*tokens"]
) -> Int32[Array, " vocab"]:
    """Return `counts` after one more token or several. Ids past the vocabulary are dropped."""
    return counts.at[token].add(1, mode="drop")
