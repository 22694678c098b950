"""KL, likelihood and agreement match NumPy, down to differences that float32 hardly resolves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.quality.metrics import exp_excess, token_scores

SPREADS = [1e-6, 1e-5, 1e-3, 0.1, 1.0, 10.0]


def pair(
    spread: float, *, tokens: int = 12, vocab: int = 500, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    base = rng.normal(scale=3.0, size=(tokens, vocab)).astype(np.float32)
    return base, (base + shift + spread * rng.normal(size=base.shape)).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.longdouble)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL by its definition, in extended precision."""
    p, q = log_softmax(base), log_softmax(other)
    return np.sum(np.exp(p) * (p - q), axis=-1).astype(np.float64)


NEXT_IDS = np.arange(12, dtype=np.int32) * 7


@pytest.mark.parametrize("spread", SPREADS)
def test_kl_matches_extended_precision(spread):
    """All terms are positive: the relative error is that of p (1e-6) and of a square."""
    base, other = pair(spread)
    found = np.asarray(jax.jit(token_scores)(base, other, NEXT_IDS).kl)
    np.testing.assert_allclose(found, divergence(base, other), rtol=2e-5)


def test_kl_is_invariant_to_a_constant_added_to_all_logits():
    """The mean has an error of up to 1e-6 here: half its square is 5e-13, and KL is 5e-7."""
    base, other = pair(1e-3, shift=3.0)
    found = np.asarray(jax.jit(token_scores)(base, other, NEXT_IDS).kl)
    np.testing.assert_allclose(found, divergence(base, other), rtol=2e-5)


def test_kl_of_equal_logits_is_exactly_zero():
    base, _ = pair(1.0)
    found = jax.jit(token_scores)(base, base.copy(), NEXT_IDS)
    assert np.all(np.asarray(found.kl) == 0) and np.all(found.agrees)


def test_kl_is_right_where_float32_lacks_the_range():
    """A token with p = exp(-120) that the other finds likely: exp(d) is infinite and p is 0."""
    base, other = pair(1e-3)
    base[:6, 7], other[:6, 7] = -120, np.linspace(-30, 30, 6)
    found = np.asarray(jax.jit(token_scores)(base, other, NEXT_IDS).kl)
    wanted = divergence(base, other)
    np.testing.assert_allclose(found[6:], wanted[6:], rtol=2e-5)
    np.testing.assert_allclose(
        found[:6], wanted[:6], rtol=2e-5, atol=1e-5
    )  # of a log-sum-exp of numbers around 10
    assert wanted[0] < 1e-5 and wanted[5] > 15


@pytest.mark.parametrize("spread", [1e-3, 10.0])
def test_likelihood_and_agreement_match_numpy(spread):
    """log-sum-exp and the difference both round at a magnitude of up to 40: 4e-6."""
    base, other = pair(spread)
    found = jax.jit(token_scores)(base, other, NEXT_IDS)
    nll = -log_softmax(other)[np.arange(12), NEXT_IDS]
    np.testing.assert_allclose(np.asarray(found.nll), nll.astype(np.float64), atol=8e-6)
    agrees = base.argmax(axis=-1) == other.argmax(axis=-1)
    np.testing.assert_array_equal(np.asarray(found.agrees), agrees)
    assert agrees.all() == (spread < 1)


def test_exp_excess_is_accurate_on_both_sides_of_the_series():
    """Each branch loses at most a factor of 10 to cancellation: 2e-6 covers 30 roundings."""
    x = np.concatenate([s * np.geomspace(1e-12, 20, 400) for s in (-1, 1)]).astype(np.float32)
    exact = x.astype(np.longdouble)
    terms = [exact**k / np.prod(np.arange(1, k + 1, dtype=np.longdouble)) for k in range(2, 30)]
    exact = np.where(np.abs(x) < 0.9, sum(terms), np.expm1(exact) - exact)
    np.testing.assert_allclose(
        np.asarray(exp_excess(jnp.asarray(x))), exact.astype(np.float64), rtol=2e-6
    )
