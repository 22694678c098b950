"""Metrics of two sets of logits for the same tokens, accurate for very small differences too."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from jfp8kv.core.pytree import pytree

SERIES_BELOW = 0.5  # |x| below which `exp_excess` uses its series
SERIES_TERMS = 7  # powers 2 to 8
FAR = 40.0  # above this logit difference float32 may lack the range for exp(d) or for p


@pytree
class TokenScores:
    """Metrics per token.

    Attributes:
      nll: negative log-likelihood of the next token, in nats.
      kl: KL(baseline || other) of the next-token distributions, in nats.
      agrees: whether both have the same most likely token.
    """

    nll: Float32[Array, " tokens"]
    kl: Float32[Array, " tokens"]
    agrees: Bool[Array, " tokens"]


def exp_excess(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return `exp(x) - 1 - x`, which is never negative, to a few units in the last place.

    `expm1(x) - x` loses all digits to cancellation as x goes to 0. Below 1/2 the series x^2/2 (1 +
    x/3 (1 + x/4 (...))) replaces it. Its truncation error is at most 2 * 0.5^7 / 9! = 4e-8 of the
    sum, less than the rounding of float32. Above 1/2, cancellation costs a factor of (|expm1(x)| +
    |x|) / exp_excess(x) < 10.
    """
    small = jnp.clip(x, -SERIES_BELOW, SERIES_BELOW)
    series = jnp.ones_like(x)
    for k in range(SERIES_TERMS + 1, 2, -1):
        series = 1 + small / k * series
    return jnp.where(jnp.abs(x) < SERIES_BELOW, small * small / 2 * series, jnp.expm1(x) - x)


def kl_divergence(
    base: Float[Array, "tokens vocab"], other: Float[Array, "tokens vocab"]
) -> Float[Array, " tokens"]:
    """Return KL(softmax(base) || softmax(other)) in nats; exactly 0 for equal logits.

    With p = softmax(base) and d = other - base, log p_i - log q_i = log(sum_j p_j exp d_j) - d_i,
    so KL = log E exp(d) - E d, with means over p. A constant added to d cancels. Subtract m = E d:
    KL = log E exp(d - m) = log1p(E [expm1(d - m) - (d - m)]), because the mean of the added term is
    0. Every term is positive, so nothing cancels, while log p - log q would keep the rounding of
    the logits, about 1e-6, however small KL is. An error e in m adds e^2 / 2.

    Where some d is so large that float32 lacks the range, log E exp(d) is the log-sum-exp of log p
    + d. There KL is large, or p so small that it hardly counts.
    """
    log_p = jax.nn.log_softmax(base, axis=-1)
    p = jnp.exp(log_p)
    d = other - base
    d = d - jnp.sum(p * d, axis=-1, keepdims=True)
    near = jnp.log1p(jnp.sum(p * exp_excess(jnp.minimum(d, FAR)), axis=-1))
    is_far = jnp.max(d, axis=-1) > FAR

    def with_far() -> Float[Array, " tokens"]:
        far = jnp.maximum(jax.nn.logsumexp(log_p + d, axis=-1), 0.0)
        return jnp.where(is_far, far, near)

    kl: Array = lax.cond(jnp.any(is_far), with_far, lambda: near)
    return kl


def token_scores(
    base: Float[Array, "tokens vocab"],
    other: Float[Array, "tokens vocab"],
    next_ids: Int[Array, " tokens"],
) -> TokenScores:
    """Return the metrics of `other` against `base`.

    `next_ids` is the token that follows each one, any id where there is none.
    """
    base, other = base.astype(jnp.float32), other.astype(jnp.float32)
    chosen = jnp.take_along_axis(other, next_ids[:, None], axis=-1)[:, 0]
    nll = jax.nn.logsumexp(other, axis=-1) - chosen
    agrees = jnp.argmax(base, axis=-1) == jnp.argmax(other, axis=-1)
    return TokenScores(nll, kl_divergence(base, other), agrees)
