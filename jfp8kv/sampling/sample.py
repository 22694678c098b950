"""Sample the next token of each request from its logits, with one program for all settings.

    logits -> bias, penalties, min_tokens, bitmask -> temperature -> top-k -> top-p -> min-p -> draw

The draw is a race of exponential clocks: token i finishes at noise_i / weight_i, and the earliest
one wins with probability weight_i / sum(weights). This is the Gumbel-max trick with one logarithm
instead of two, and it needs no sum. Unlike inverse-CDF sampling it is robust to rounding: a small
change of the weights matters only if it changes the winner. Tokens about 10**7 times less likely
than the most likely one are never drawn, as always in float32.

Work that no request needs is skipped. A batch of greedy requests only takes a maximum. If every
random request has a filter, the most likely blocks of the vocabulary are searched first, and the
whole vocabulary only if the filters of a request may keep other tokens. Both paths draw the same
token, since noise is addressed by token id.

No token depends on the other requests: every function here is written for one request and batched
with `vmap`, and branches choose between computations with equal results.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jfp8kv.sampling.filters import Outside, filter_weights, weights
from jfp8kv.sampling.penalties import adjust, apply_token_bitmask
from jfp8kv.sampling.rng import exponential, fold_in
from jfp8kv.sampling.settings import SamplerSettings

T = TypeVar("T")

BLOCK = 64  # adjacent token ids that are searched together
LIKELY_BLOCKS = 128
LANES = 128


def sample(
    logits: Float32[Array, " vocab"],
    settings: SamplerSettings,
    position: Int32[Array, ""],
    prompt_counts: Int32[Array, " vocab"] | None = None,
    output_counts: Int32[Array, " vocab"] | None = None,
    bitmask: UInt32[Array, " words"] | None = None,
) -> tuple[Int32[Array, ""], Float32[Array, ""]]:
    """Sample a token of one request, and return it with its log-probability.

    The token is `vocab`, past the last one, if every adjusted logit is -inf. At temperature 0 it is
    the argmax, and the lowest id on ties. The log-probability is that of the model: the log-softmax
    of `logits` at temperature 1, without filters, penalties or bias.

    Args:
      logits: the model's logits.
      settings: the settings of the request.
      position: the position of the token in the output, from 0.
      prompt_counts, output_counts: see `adjust`.
      bitmask: see `apply_token_bitmask`.
    """
    adjusted = adjust(logits, settings, position, prompt_counts, output_counts)
    if bitmask is not None:
        adjusted = apply_token_bitmask(adjusted, bitmask)
    drawn = _draw(adjusted, settings, fold_in(settings.key, position))
    greedy = argmax(adjusted)
    token = _if_any(jnp.where(settings.temperature > 0, drawn, greedy), adjusted, greedy)
    return token, logprob_at(logits, token)


def sample_batch(
    logits: Float32[Array, "requests vocab"],
    settings: SamplerSettings,
    positions: Int32[Array, " requests"],
    prompt_counts: Int32[Array, "requests vocab"] | None = None,
    output_counts: Int32[Array, "requests vocab"] | None = None,
    bitmask: UInt32[Array, "requests words"] | None = None,
) -> tuple[Int32[Array, " requests"], Float32[Array, " requests"]]:
    """Return `sample` of each request. `settings` is stacked (`stack_settings`)."""
    adjusted = _adjust_batch(logits, settings, positions, prompt_counts, output_counts)
    if bitmask is not None:
        adjusted = jax.vmap(apply_token_bitmask)(adjusted, bitmask)
    greedy = jax.vmap(argmax)(adjusted)
    random = settings.temperature > 0

    def draw() -> Int32[Array, " requests"]:
        keys = jax.vmap(fold_in)(settings.key, positions)
        return jnp.where(random, _draw_batch(adjusted, settings, keys), greedy)

    tokens = jax.lax.cond(jnp.any(random), draw, lambda: greedy)
    tokens = jax.vmap(_if_any)(tokens, adjusted, greedy)
    return tokens, jax.vmap(logprob_at)(logits, tokens)


def _adjust_batch(
    logits: Float32[Array, "requests vocab"],
    settings: SamplerSettings,
    positions: Int32[Array, " requests"],
    prompt_counts: Int32[Array, "requests vocab"] | None,
    output_counts: Int32[Array, "requests vocab"] | None,
) -> Float32[Array, "requests vocab"]:
    """Return `adjust` of each request, or the unchanged logits if no request needs it."""
    no_ids = not settings.bias_ids.shape[1] and not settings.min_tokens_ids.shape[1]
    if no_ids and prompt_counts is None and output_counts is None:
        return logits
    penalties = (
        settings.presence_penalty,
        settings.frequency_penalty,
        settings.repetition_penalty - 1,
    )
    biased = jnp.any(settings.bias_ids < logits.shape[1])
    penalized = jnp.any(jnp.stack(penalties) != 0)
    adjusted: Array = jax.lax.cond(
        biased | penalized | jnp.any(positions < settings.min_tokens),
        lambda: jax.vmap(adjust)(logits, settings, positions, prompt_counts, output_counts),
        lambda: logits,
    )
    return adjusted


def _if_any(
    token: Int32[Array, ""], logits: Float32[Array, " vocab"], greedy: Int32[Array, ""]
) -> Int32[Array, ""]:
    """Return `token`, or `vocab` if all tokens are masked, the greedy one included."""
    return jnp.where(logits[greedy] == -jnp.inf, logits.shape[0], token)


def _draw_batch(
    logits: Float32[Array, "requests vocab"],
    settings: SamplerSettings,
    keys: UInt32[Array, "requests 2"],
) -> Int32[Array, " requests"]:
    """Draw a token for each request by the cheapest method that is valid for all of them.

    The results of greedy requests are meaningless.
    """

    def over(draw: Callable[..., T]) -> Callable[[], T]:
        def batched() -> T:
            drawn: T = jax.vmap(draw)(logits, settings, keys)
            return drawn

        return batched

    def filtered_draw() -> Int32[Array, " requests"]:
        if logits.shape[1] < 2 * BLOCK * LIKELY_BLOCKS:
            return over(_draw)()
        skipped = jnp.zeros(greedy.shape, jnp.int32), jnp.zeros(greedy.shape, bool)
        tokens, certain = jax.lax.cond(
            jnp.all(filtered | greedy), over(_draw_likely), lambda: skipped
        )
        filtered_tokens: Array = jax.lax.cond(
            jnp.all(certain | greedy), lambda: tokens, over(_draw)
        )
        return filtered_tokens

    greedy = settings.temperature == 0
    filtered = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    tokens: Array = jax.lax.cond(jnp.any(filtered & ~greedy), filtered_draw, over(_draw_unfiltered))
    return tokens


def _draw(
    logits: Float32[Array, " vocab"], settings: SamplerSettings, key: UInt32[Array, "2"]
) -> Int32[Array, ""]:
    kept, _ = filter_weights(logits, settings, jnp.max(logits))
    return _race(kept, _all_ids(logits), key)


def _draw_unfiltered(
    logits: Float32[Array, " vocab"], settings: SamplerSettings, key: UInt32[Array, "2"]
) -> Int32[Array, ""]:
    return _race(weights(logits, settings.temperature, jnp.max(logits)), _all_ids(logits), key)


def _all_ids(logits: Float32[Array, " vocab"]) -> Int32[Array, " vocab"]:
    return jnp.arange(logits.shape[0], dtype=jnp.int32)


def _draw_likely(
    logits: Float32[Array, " vocab"], settings: SamplerSettings, key: UInt32[Array, "2"]
) -> tuple[Int32[Array, ""], Bool[Array, ""]]:
    """Return `_draw` over the blocks with the largest maxima, and whether it is certain.

    It is certain if the tokens of the other blocks cannot change the result.
    """
    blocks = jnp.pad(logits, (0, -logits.shape[0] % BLOCK), constant_values=-jnp.inf).reshape(
        -1, BLOCK
    )
    best, order = jax.lax.top_k(jnp.max(blocks, axis=1), LIKELY_BLOCKS + 1)
    chosen = jnp.sort(order[:-1])  # in order of ids, so that ties go to the lowest one
    likely = blocks[chosen].reshape(-1)
    ids = (chosen[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)).reshape(-1)

    def mass(x: Float32[Array, " tokens"]) -> Float32[Array, ""]:
        return jnp.sum(weights(x, settings.temperature, best[0]))

    outside = Outside(ceiling=best[-1], mass=jnp.maximum(mass(logits) - mass(likely), 0))
    kept, certain = filter_weights(likely, settings, best[0], outside)
    return _race(kept, ids, key), certain


def _race(
    weight: Float32[Array, " tokens"], ids: Int32[Array, " tokens"], key: UInt32[Array, "2"]
) -> Int32[Array, ""]:
    """Return an id with probability proportional to its weight.

    The largest weight is 1, so a token of weight 0 never wins.
    """
    return ids[argmax(weight / exponential(key, ids))]


def argmax(x: Float32[Array, " tokens"]) -> Int32[Array, ""]:
    """Return the index of the maximum, the first one on ties.

    The maximum of each row is computed first, and then the index within the best row. The first
    step vectorizes, which on a CPU makes this 8 times faster than `jnp.argmax`.
    """
    whole = x.shape[0] // LANES * LANES
    if whole < x.shape[0]:
        tail = jnp.argmax(x[whole:]).astype(jnp.int32) + whole
        if not whole:
            return tail
        head = argmax(x[:whole])
        return jnp.where(x[head] >= x[tail], head, tail)
    rows = x.reshape(-1, LANES)
    row = jnp.argmax(jnp.max(rows, axis=1)).astype(jnp.int32)
    return row * LANES + jnp.argmax(rows[row]).astype(jnp.int32)


def logprob_at(logits: Float32[Array, " vocab"], token: Int32[Array, ""]) -> Float32[Array, ""]:
    """Return the log-probability of `token` under softmax(logits)."""
    peak, log_total = _log_normalizer(logits)
    return (logits[token] - peak) - log_total


def top_logprobs(
    logits: Float32[Array, " vocab"], k: int
) -> tuple[Float32[Array, " k"], Int32[Array, " k"]]:
    """Return the `k` largest log-probabilities under softmax(logits) and their ids.

    The most likely token comes first, and of equally likely ones the lowest id.
    """
    values, ids = jax.lax.top_k(logits, k)
    peak, log_total = _log_normalizer(logits)
    return (values - peak) - log_total, ids


def _log_normalizer(
    logits: Float32[Array, " vocab"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Return the maximum m of the logits, and log(sum(exp(logits - m))).

    The two are subtracted from a logit one after the other. Their sum would round to the precision
    of m, which may be far from the logit's log-probability.
    """
    peak = jnp.max(logits)
    finite = jnp.where(peak > -jnp.inf, peak, 0)  # -inf - -inf is NaN
    return finite, jnp.log(jnp.sum(jnp.exp(logits - finite)))
