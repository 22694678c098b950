"""Top-k, top-p and min-p against an implementation that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfp8kv.sampling.filters import Outside, filter_weights, ordered, weights
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.rng import request_key
from jfp8kv.sampling.settings import settings_from
from tests.sampling import oracle

kept = jax.jit(filter_weights)


def probabilities(logits, params) -> np.ndarray:
    logits = jnp.asarray(logits, jnp.float32)
    settings = settings_from(params, request_key(0))
    weight, certain = kept(logits, settings, jnp.max(logits))
    assert certain
    weight = np.asarray(weight, np.float64)
    assert np.isfinite(weight).all() and weight.max() == 1
    return oracle.normalized(weight)


def check_against_sorting(logits, params) -> None:
    """Check that the same tokens are kept, with the same probabilities.

    An exponent in [-100, 0] has a float32 error of at most 100 * 2**-24 = 6e-6, which is the
    relative error of its exponential. The sum of the kept weights has no larger one. 2e-5 covers
    both.
    """
    found = probabilities(logits, params)
    expected = oracle.distribution(np.asarray(logits, np.float32), params)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


MIXTURES = [
    dict(),
    dict(temperature=0.3),
    dict(temperature=7.0),
    dict(top_k=1),
    dict(top_k=40),
    dict(top_k=997),
    dict(top_k=998),
    dict(top_k=2**31 - 1),
    dict(top_k=-1),
    dict(top_p=0.003),
    dict(top_p=0.5),
    dict(top_p=0.9),
    dict(top_p=0.999),
    dict(min_p=0.01),
    dict(min_p=1.0),
    dict(temperature=0.7, top_p=0.8),
    dict(temperature=1.5, top_k=50, top_p=0.9, min_p=0.02),
    dict(top_k=3, top_p=0.99),
    dict(temperature=3.0, top_k=500, top_p=0.7, min_p=0.3),
]


@pytest.mark.parametrize("fields", MIXTURES, ids=str)
def test_the_kept_tokens_are_those_of_sorting(fields):
    rng = np.random.default_rng(0)
    for spread in (0.1, 3.0):
        check_against_sorting(rng.normal(size=998) * spread, SamplingParams(**fields))


def test_top_k_keeps_exactly_k_when_no_logits_are_equal():
    logits = np.random.default_rng(1).normal(size=5000)
    for k in (1, 2, 100, 2500, 4999):
        assert (probabilities(logits, SamplingParams(top_k=k)) > 0).sum() == k


@settings(max_examples=150)
@given(
    st.lists(
        st.sampled_from([-50.0, -3.0, -1.0, -0.0, 0.0, 1.0, 1.5, 2.0]), min_size=1, max_size=12
    ),
    st.integers(0, 13),
    st.sampled_from([1.0, 0.97, 0.61, 0.33, 0.04]),
    st.sampled_from([0.0, 0.05, 0.45, 1.0]),
)
def test_tokens_as_likely_as_the_last_one_kept_are_kept_with_it(levels, top_k, top_p, min_p):
    logits = (levels * 12)[:12]  # one shape: one compilation
    check_against_sorting(logits, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))


def test_a_uniform_distribution_is_kept_whole():
    for fields in (dict(top_k=3), dict(top_p=0.01), dict(min_p=1.0)):
        assert (probabilities(np.full(64, 2.5), SamplingParams(**fields)) == 1 / 64).all()


def test_without_filters_even_very_unlikely_tokens_are_kept():
    logits = np.concatenate([[0.0], np.linspace(-80, -20, 100)])
    assert (probabilities(logits, SamplingParams(top_p=1.0)) > 0).all()
    assert (probabilities(logits, SamplingParams(top_p=1.0 - 2**-24)) > 0).sum() < 101


def test_masked_tokens_are_never_kept_and_never_produce_nan():
    logits = np.array([-np.inf, 1.0, -np.inf, 0.5, -np.inf, -np.inf, 3.0, -np.inf])
    for fields in (
        dict(),
        dict(top_k=5),
        dict(top_p=0.99),
        dict(min_p=0.001),
        dict(top_k=8, top_p=0.5),
    ):
        check_against_sorting(logits, SamplingParams(**fields))


def test_the_weights_are_zero_and_not_nan_if_every_token_is_masked():
    logits = jnp.full(8, -jnp.inf)
    for fields in (dict(), dict(top_k=3, top_p=0.5, min_p=0.1)):
        settings = settings_from(SamplingParams(**fields), request_key(0))
        weight, _ = kept(logits, settings, jnp.max(logits))
        assert not np.asarray(weight).any()


def test_ordered_keys_have_the_order_of_the_floats():
    tiny = np.finfo(np.float32).tiny
    floats = np.float32(
        [-np.inf, -3e38, -1.5, -1, -tiny, -0.0, 0.0, tiny, 1, 1 + 2**-23, 3e38, np.inf]
    )
    keys = np.asarray(ordered(jnp.asarray(floats)), np.int64)
    np.testing.assert_array_equal(
        np.sign(np.diff(keys)),
        np.sign(np.diff(np.where(np.isinf(floats), np.sign(floats) * 3.3e38, floats))),
    )


@pytest.mark.parametrize("fields", MIXTURES, ids=str)
def test_a_partial_search_is_certain_only_if_it_equals_the_full_search(fields):
    rng = np.random.default_rng(2)
    settings = settings_from(SamplingParams(**fields), request_key(0))
    certainties = []
    for spread in (0.1, 2.0, 6.0, 20.0):
        logits = jnp.asarray(np.sort(rng.normal(size=998) * spread)[::-1].copy(), jnp.float32)
        part, rest = logits[:100], logits[100:]
        mass = jnp.sum(weights(rest, jnp.asarray(settings.temperature), logits[0]))
        found, certain = kept(part, settings, logits[0], Outside(ceiling=rest[0], mass=mass))
        whole, _ = kept(logits, settings, logits[0])
        certainties.append(bool(certain))
        if certain:
            np.testing.assert_array_equal(np.asarray(whole), np.concatenate([found, np.zeros(898)]))
    unfiltered = fields.get("top_k", 0) <= 0 and "top_p" not in fields and "min_p" not in fields
    assert any(certainties) != (unfiltered or fields.get("top_k", 0) > 100)
