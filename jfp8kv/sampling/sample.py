"""The next token of each request, from its logits: one compiled program for whatever mixture of settings a batch holds.

    logits -> bias, penalties, min_tokens, grammar -> temperature -> top-k -> top-p -> min-p -> a draw

The draw is a race: token i runs for the time noise_i / weight_i with exponential noise, and the shortest time wins,
with probability weight_i / sum(weights) (equivalently the Gumbel-max trick, with one logarithm instead of two and no
sum). A race, unlike a search in the cumulative sum, moves no token because others changed a little: rounding that
differs from batch to batch changes the outcome only when it changes who is first. Tokens about 10**7 times less
likely than the rest are never drawn, as always in float32.

What is not asked for is not paid for. A batch in which every request is greedy takes only a maximum. A batch in which
every random request is filtered looks at the likeliest blocks of the vocabulary alone, and at all of it only if some
request's filters reach beyond them. Both ways give the same token, since noise belongs to the token's id.

No token depends on its neighbours: every function here is for one request, under `vmap`, and the branches choose
between computations of equal results.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jfp8kv.sampling.filters import Outside, keep, weights
from jfp8kv.sampling.penalties import adjust, allow
from jfp8kv.sampling.rng import exponential, fold_in
from jfp8kv.sampling.settings import SamplerSettings

BLOCK = 64  # ids side by side that are looked at together
LIKELY_BLOCKS = 128
LANES = 128


def sample(
    logits: Float32[Array, " vocab"],
    settings: SamplerSettings,
    position: Int32[Array, ""],
    prompt_counts: Int32[Array, " vocab"] | None = None,
    output_counts: Int32[Array, " vocab"] | None = None,
    allowed: UInt32[Array, " words"] | None = None,
) -> tuple[Int32[Array, ""], Float32[Array, ""]]:
    """The token at `position` of one request's output (0 is its first), and its log-probability.

    Where every adjusted logit is -inf there is no token to choose: it is `vocab`, past the last.

    The log-probability is that of the model: log-softmax of `logits` as given, at temperature 1, without filters,
    penalties or bias. Counts are as for `adjust`, `allowed` as for `allow`. At temperature 0 the token is the argmax, the
    lowest id on ties.
    """
    adjusted = adjust(logits, settings, position, prompt_counts, output_counts)
    if allowed is not None:
        adjusted = allow(adjusted, allowed)
    drawn = _draw(adjusted, settings, fold_in(settings.key, position))
    greedy = argmax(adjusted)
    token = _or_none(jnp.where(settings.temperature > 0, drawn, greedy), adjusted, greedy)
    return token, logprob_at(logits, token)


def sample_batch(
    logits: Float32[Array, "requests vocab"],
    settings: SamplerSettings,
    positions: Int32[Array, " requests"],
    prompt_counts: Int32[Array, "requests vocab"] | None = None,
    output_counts: Int32[Array, "requests vocab"] | None = None,
    allowed: UInt32[Array, "requests words"] | None = None,
) -> tuple[Int32[Array, " requests"], Float32[Array, " requests"]]:
    """`sample` for each request. `settings` is stacked (`stack_settings`)."""
    adjusted = _adjusted(logits, settings, positions, prompt_counts, output_counts)
    if allowed is not None:
        adjusted = jax.vmap(allow)(adjusted, allowed)
    greedy = jax.vmap(argmax)(adjusted)
    random = settings.temperature > 0

    def draw() -> Int32[Array, " requests"]:
        keys = jax.vmap(fold_in)(settings.key, positions)
        return jnp.where(random, _draw_batch(adjusted, settings, keys), greedy)

    tokens = jax.lax.cond(jnp.any(random), draw, lambda: greedy)
    tokens = jax.vmap(_or_none)(tokens, adjusted, greedy)
    return tokens, jax.vmap(logprob_at)(logits, tokens)


def _adjusted(
    logits: Float32[Array, "requests vocab"],
    settings: SamplerSettings,
    positions: Int32[Array, " requests"],
    prompt_counts: Int32[Array, "requests vocab"] | None,
    output_counts: Int32[Array, "requests vocab"] | None,
) -> Float32[Array, "requests vocab"]:
    """`adjust` for each request, or the logits as they are where nobody asks for it."""
    if (
        not settings.bias_ids.shape[1]
        and not settings.held_ids.shape[1]
        and prompt_counts is None
        and output_counts is None
    ):
        return logits
    penalties = (
        settings.presence_penalty,
        settings.frequency_penalty,
        settings.repetition_penalty - 1,
    )
    biased, penalized = (
        jnp.any(settings.bias_ids < logits.shape[1]),
        jnp.any(jnp.stack(penalties) != 0),
    )
    return jax.lax.cond(
        biased | penalized | jnp.any(positions < settings.min_tokens),
        lambda: jax.vmap(adjust)(logits, settings, positions, prompt_counts, output_counts),
        lambda: logits,
    )


def _or_none(
    token: Int32[Array, ""], logits: Float32[Array, " vocab"], likeliest: Int32[Array, ""]
) -> Int32[Array, ""]:
    """`token`, or past the last one where even the likeliest is forbidden."""
    return jnp.where(logits[likeliest] == -jnp.inf, logits.shape[0], token)


def _draw_batch(
    logits: Float32[Array, "requests vocab"],
    settings: SamplerSettings,
    keys: UInt32[Array, "requests 2"],
) -> Int32[Array, " requests"]:
    """A draw for each request, in the cheapest way that serves them all. What greedy ones get has no meaning."""

    def over(draw: Callable) -> Callable:
        return lambda: jax.vmap(draw)(logits, settings, keys)

    def filtered_draw() -> Int32[Array, " requests"]:
        if logits.shape[1] < 2 * BLOCK * LIKELY_BLOCKS:
            return over(_draw)()
        nothing = jnp.zeros(greedy.shape, jnp.int32), jnp.zeros(greedy.shape, bool)
        tokens, certain = jax.lax.cond(
            jnp.all(filtered | greedy), over(_draw_likely), lambda: nothing
        )
        return jax.lax.cond(jnp.all(certain | greedy), lambda: tokens, over(_draw))

    greedy = settings.temperature == 0
    filtered = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    return jax.lax.cond(jnp.any(filtered & ~greedy), filtered_draw, over(_draw_unfiltered))


def _draw(
    logits: Float32[Array, " vocab"], settings: SamplerSettings, key: UInt32[Array, "2"]
) -> Int32[Array, ""]:
    kept, _ = keep(logits, settings, jnp.max(logits))
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
    """`_draw` over the blocks with the largest maxima; and whether it is certain that the others do not matter."""
    blocks = jnp.pad(logits, (0, -logits.shape[0] % BLOCK), constant_values=-jnp.inf).reshape(
        -1, BLOCK
    )
    best, order = jax.lax.top_k(jnp.max(blocks, axis=1), LIKELY_BLOCKS + 1)
    chosen = jnp.sort(order[:-1])  # by id again, so that ties still go to the lowest
    likely = blocks[chosen].reshape(-1)
    ids = (chosen[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)).reshape(-1)

    def mass(x: Float32[Array, " tokens"]) -> Float32[Array, ""]:
        return jnp.sum(weights(x, settings.temperature, best[0]))

    outside = Outside(ceiling=best[-1], mass=jnp.maximum(mass(logits) - mass(likely), 0))
    kept, certain = keep(likely, settings, best[0], outside)
    return _race(kept, ids, key), certain


def _race(
    weight: Float32[Array, " tokens"], ids: Int32[Array, " tokens"], key: UInt32[Array, "2"]
) -> Int32[Array, ""]:
    """An id with probability proportional to its weight. The largest weight is 1, so a token of weight 0 never wins."""
    return ids[argmax(weight / exponential(key, ids))]


def argmax(x: Float32[Array, " tokens"]) -> Int32[Array, ""]:
    """The place of the maximum, the first on ties.

    In two steps, the long one of which vectorizes: on CPU 8 times faster than `jnp.argmax`.
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

    The two are subtracted from a logit one after the other. Their sum would round to the precision of
    m, which may be far from the logit's log-probability.
    """
    peak = jnp.max(logits)
    finite = jnp.where(peak > -jnp.inf, peak, 0)  # -inf - -inf is NaN
    return finite, jnp.log(jnp.sum(jnp.exp(logits - finite)))
