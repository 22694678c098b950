"""What two sets of logits for the same token have to say of each other, well-conditioned where they hardly differ."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from jfp8kv.core.pytree import pytree

SERIES_BELOW, SERIES_TERMS = 0.5, 7  # |x| below which `excess` sums powers 2 to 8
FAR = 40.0  # a difference of logits this large may bring together an exp(d) too large for float32 and a p too small


@pytree
class Scores:
    """By token: `nll` of the token that follows, in nats; `kl` from the base's distribution, in nats; whether both agree on
    the likeliest token."""

    nll: Float32[Array, " tokens"]
    kl: Float32[Array, " tokens"]
    agrees: Bool[Array, " tokens"]


def excess(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`exp(x) - 1 - x`, never negative, to a few units in the last place, for x as small as may be.

    `expm1(x) - x` loses all its digits to cancellation as x goes to 0. Below 1/2 the series x^2/2 (1 + x/3 (1 + x/4 (...)))
    stands in: what it leaves out is at most 2 * 0.5^7 / 9! = 4e-8 of the sum, under the rounding of float32. Above, the
    cancellation costs a factor of (|expm1(x)| + |x|) / excess(x) < 10.
    """
    small = jnp.clip(x, -SERIES_BELOW, SERIES_BELOW)
    series = jnp.ones_like(x)
    for k in range(SERIES_TERMS + 1, 2, -1):
        series = 1 + small / k * series
    return jnp.where(jnp.abs(x) < SERIES_BELOW, small * small / 2 * series, jnp.expm1(x) - x)


def divergence(
    base: Float[Array, "tokens vocab"], other: Float[Array, "tokens vocab"]
) -> Float[Array, " tokens"]:
    """KL(softmax(base) || softmax(other)), in nats; exactly 0 where the logits are the same.

    With p = softmax(base) and d = other - base, log p_i - log q_i = log(sum_j p_j exp d_j) - d_i, so that
    KL = log E exp(d) - E d, means taken over p. Both sides change alike when a constant is added to d; take m = E d away, and
    KL = log E exp(d - m) = log1p(E [expm1(d - m) - (d - m)]), since the mean of what was added inside is 0. Every term is
    positive: nothing cancels, where log p - log q would leave the rounding of the logits, 1e-6 or so, however small KL is.
    An m that is off by e adds e^2 / 2. Where some d is so large that float32 lacks range, log E exp(d) is taken as the
    log-sum-exp of log p + d: KL is large there, or p so small that it hardly counts.
    """
    log_p = jax.nn.log_softmax(base, axis=-1)
    p = jnp.exp(log_p)
    d = other - base
    d = d - jnp.sum(p * d, axis=-1, keepdims=True)
    near = jnp.log1p(jnp.sum(p * excess(jnp.minimum(d, FAR)), axis=-1))
    is_far = jnp.max(d, axis=-1) > FAR

    def with_far() -> Float[Array, " tokens"]:
        return jnp.where(is_far, jnp.maximum(jax.nn.logsumexp(log_p + d, axis=-1), 0.0), near)

    return lax.cond(jnp.any(is_far), with_far, lambda: near)


def scores(
    base: Float[Array, "tokens vocab"],
    other: Float[Array, "tokens vocab"],
    following: Int[Array, " tokens"],
) -> Scores:
    """How `other` does against `base`; `following` is the token after each, any id where there is none."""
    base, other = base.astype(jnp.float32), other.astype(jnp.float32)
    chosen = jnp.take_along_axis(other, following[:, None], axis=-1)[:, 0]
    nll = jax.nn.logsumexp(other, axis=-1) - chosen
    return Scores(
        nll, divergence(base, other), jnp.argmax(base, axis=-1) == jnp.argmax(other, axis=-1)
    )
