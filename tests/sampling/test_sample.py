"""Sampling: distributions, independence of the batch, penalties, masks and log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.penalties import adjust, apply_token_bitmask, count_token
from jfp8kv.sampling.rng import request_key
from jfp8kv.sampling.sample import argmax, logprob_at, sample, sample_batch, top_logprobs
from jfp8kv.sampling.settings import settings_from, stack_settings
from tests.sampling import oracle

VOCAB = 24
DRAWS = 20_000
LARGE = 20_011  # a prime, large enough that the most likely blocks are searched first
batch = jax.jit(sample_batch)


def stacked(fields: list[dict], eos_ids=(), rows=None):
    """Return the settings of requests number 0, 1, ..., each without a seed unless given."""
    each = [
        settings_from(
            SamplingParams(**kw), request_key(kw.get("seed"), number=number), eos_ids=eos_ids
        )
        for number, kw in enumerate(fields)
    ]
    return stack_settings(each, rows=rows)


def at(*positions) -> jax.Array:
    return jnp.asarray(positions, jnp.int32)


def answers(logits, fields, positions, eos_ids=()):
    """Return tokens and log-probabilities from one compiled program of up to 7 rows and 300 ids.

    Missing ids are masked.
    """
    rows = np.full((8, 300), -np.inf, np.float32)
    for row, x in zip(rows, logits, strict=False):
        row[: len(x)] = x
    # The padding rows have id lists, so that all calls have the same shapes.
    lists = dict(logit_bias={0: 0.0}, min_tokens=1, stop_token_ids=[1])
    settings = stacked([*fields, *[lists] * (8 - len(fields))], eos_ids)
    tokens, logprobs = batch(jnp.asarray(rows), settings, at(*positions, *[0] * (8 - len(fields))))
    return tokens[: len(fields)], logprobs[: len(fields)]


@jax.jit
def drawn(logits, settings, keys, positions):
    def one(key, position):
        return sample(logits, dataclasses.replace(settings, key=key), position)[0]

    return jax.vmap(one)(keys, positions)


def draws(logits, keys, **fields):
    """Return `DRAWS` tokens: positions 0, 1, ... of requests with these keys."""
    settings = jax.tree.map(jnp.asarray, settings_from(SamplingParams(**fields), request_key(0)))
    positions = np.arange(DRAWS) // len(keys)
    return drawn(
        jnp.asarray(logits), settings, np.resize(keys, (DRAWS, 2)), positions.astype(np.int32)
    )


SETTINGS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_k=4),
    dict(top_p=0.7),
    dict(min_p=0.1),
    dict(temperature=0.8, top_k=9, top_p=0.9, min_p=0.05),
    dict(temperature=2.0, top_p=0.8),
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_tokens_are_drawn_with_the_probabilities_of_the_oracle(fields):
    logits = np.float32(np.random.default_rng(3).normal(size=VOCAB))
    params = SamplingParams(**fields)
    tokens = draws(logits, [request_key(17)], **fields)
    expected = oracle.distribution(logits, params) * DRAWS
    seen = np.bincount(tokens, minlength=VOCAB)
    assert not seen[expected == 0].any()
    rare = expected < 5  # chi-square needs about five of each: rare tokens are counted together
    groups = [(seen[i], expected[i]) for i in np.flatnonzero(~rare)] + [
        (seen[rare].sum(), expected[rare].sum())
    ]
    observed, wanted = np.array([(o, e) for o, e in groups if e > 0]).T
    # The key is fixed, so this passes always or never. A correct sampler fails for 1 key in 10,000.
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


def test_keys_of_different_seeds_draw_from_the_same_distribution():
    logits = np.float32(np.random.default_rng(4).normal(size=VOCAB))
    tokens = draws(logits, [request_key(seed) for seed in range(1000)])
    expected = oracle.distribution(logits, SamplingParams()) * DRAWS
    assert stats.chisquare(np.bincount(tokens, minlength=VOCAB), expected).pvalue > 1e-4


def test_greedy_takes_the_lowest_id_of_equal_maxima():
    for vocab in (1, 5, 128, 129, 300, 512):
        for places in ([0], [vocab - 1], [vocab // 2, vocab - 1], list(range(vocab))):
            x = np.full(vocab, -1.0, np.float32)
            x[places] = 2.0
            assert argmax(jnp.asarray(x)) == np.argmax(x) == min(places)


def test_argmax_agrees_with_numpy_where_logits_are_masked():
    for vocab in (7, 200, 384):
        x = np.float32(np.random.default_rng(vocab).normal(size=vocab))
        x[np.argsort(x)[2:]] = -np.inf
        assert argmax(jnp.asarray(x)) == np.argmax(x)
        assert argmax(jnp.full(vocab, -jnp.inf)) == 0


MIXED = [
    dict(temperature=0),
    dict(),
    dict(temperature=0.7, top_p=0.8),
    dict(top_k=5),
    dict(min_p=0.2, temperature=1.3),
    dict(logit_bias={3: 4.0, 5: -np.inf}),
    dict(temperature=0, min_tokens=4, stop_token_ids=[1, 2]),
    dict(top_k=3, top_p=0.6, seed=9),
]


def test_a_token_depends_neither_on_the_batch_nor_on_its_row():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(len(MIXED), 300)) * 2, jnp.float32)
    settings, positions = stacked(MIXED), at(*range(len(MIXED)))
    together, logprobs = batch(logits, settings, positions)
    order = np.random.default_rng(6).permutation(len(MIXED))
    moved, _ = batch(
        logits[order], jax.tree.map(lambda leaf: leaf[order], settings), positions[order]
    )
    np.testing.assert_array_equal(moved, together[order])
    for i in range(len(MIXED)):
        row = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], settings)
        alone, logprob = batch(logits[i : i + 1], row, positions[i : i + 1])
        assert alone[0] == together[i]
        np.testing.assert_allclose(logprob[0], logprobs[i], rtol=1e-6)
        single, _ = jax.jit(sample)(
            logits[i], jax.tree.map(lambda leaf, i=i: leaf[i], settings), positions[i]
        )
        assert single == together[i]


def test_mixed_settings_share_one_program():
    traces = []

    @jax.jit
    def counted(logits, settings, positions):
        traces.append(1)
        return sample_batch(logits, settings, positions)

    logits = jnp.asarray(np.random.default_rng(7).normal(size=(3, 50)), jnp.float32)
    plain = [
        fields for fields in MIXED if "logit_bias" not in fields and "min_tokens" not in fields
    ]
    for start in range(len(plain)):
        chosen = [plain[(start + i) % len(plain)] for i in range(3)]
        jax.block_until_ready(counted(logits, stacked(chosen), at(0, 5, start)))
    counted(logits, stacked([dict(), dict(top_k=2)], rows=3), at(0, 0, 0))
    assert len(traces) == 1


def test_a_seed_fixes_the_tokens_and_positions_and_samples_differ():
    logits = jnp.zeros((4, LARGE))  # uniform: two draws agree with probability 1 / 20011
    first, _ = batch(logits, stacked([dict(seed=1)] * 4), at(0, 0, 1, 2))
    again, _ = batch(
        logits, stacked([dict(), dict(seed=1), dict(seed=2), dict(seed=1)]), at(0, 0, 0, 1)
    )
    assert first[0] == first[1] == again[1]
    assert first[2] == again[3]
    assert len({int(token) for token in [*first[1:], again[0], again[2]]}) == 5
    samples = stack_settings(
        [settings_from(SamplingParams(seed=1), request_key(1, index=i)) for i in range(4)]
    )
    tokens, _ = batch(logits, samples, at(0, 0, 0, 0))
    assert tokens[0] == first[0]
    assert len(set(map(int, tokens))) == 4


def test_searching_only_the_most_likely_blocks_changes_no_token():
    """Peaked distributions need the most likely blocks only, flat ones the whole vocabulary."""
    filters = [
        dict(top_k=30),
        dict(top_p=0.8),
        dict(min_p=0.1, temperature=0.6),
        dict(top_k=8, top_p=0.5, temperature=2.0),
    ]
    rng = np.random.default_rng(8)
    whole = jax.jit(jax.vmap(sample))
    for spread in (0.5, 3.0, 8.0):
        logits = jnp.asarray(rng.normal(size=(4, LARGE)) * spread, jnp.float32)
        for position in range(3):
            positions = jnp.full(4, position, jnp.int32)
            np.testing.assert_array_equal(
                batch(logits, stacked(filters), positions)[0],
                whole(logits, stacked(filters), positions)[0],
            )
            greedy_too = stacked([*filters[:3], dict(temperature=0)])
            np.testing.assert_array_equal(
                batch(logits, greedy_too, positions)[0], whole(logits, greedy_too, positions)[0]
            )


def test_log_probabilities_are_those_of_the_model_before_any_setting():
    logits = np.float32(np.random.default_rng(9).normal(size=(4, 60)) * 3)
    fields = [
        dict(temperature=0),
        dict(temperature=5.0, top_k=2),
        dict(logit_bias={4: 50.0}),
        dict(min_p=0.3),
    ]
    tokens, logprobs = answers(logits, fields, (0, 1, 2, 3))
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    assert tokens[2] == 4
    np.testing.assert_allclose(logprobs, expected[np.arange(4), tokens], rtol=1e-5)
    np.testing.assert_allclose(
        logprob_at(jnp.asarray(logits[0]), jnp.int32(7)), expected[0, 7], rtol=1e-5
    )


def test_top_log_probabilities_come_most_likely_first_and_ties_by_id():
    x = np.float32([0.5, 2.0, -np.inf, 2.0, 1.0])
    values, ids = top_logprobs(jnp.asarray(x), 5)
    np.testing.assert_array_equal(ids, [1, 3, 4, 0, 2])
    with np.errstate(divide="ignore"):
        expected = np.log(np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum())
    np.testing.assert_allclose(values, expected[ids], rtol=1e-6)


def test_float32_log_probabilities_of_a_large_vocabulary_have_the_derived_error():
    """Against float64, for the largest vocabulary of a released model.

    Let u = 2**-24. The exponents round by u * |x - max|, which adds at most u * ln(vocab) to the
    logarithm of their sum. `exp` and `log` add 4u each. The sum of positive terms adds u for each
    sequential addition; XLA's tree reductions have fewer than 512. The two subtractions add 2u of
    the result.
    """
    vocab, unit = 262_144, 2.0**-24
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=vocab) * spread for spread in (0.01, 1, 3, 10)]
    rows += [np.full(vocab, 2.5), np.linspace(0, 1e-3, vocab), np.log1p(rng.random(vocab)) + 300]
    logits = np.float32(rows)
    tokens = rng.integers(0, vocab, len(rows)).astype(np.int32)
    tokens[1] = logits[1].argmin()
    x = logits.astype(np.float64)
    expected = x[np.arange(len(rows)), tokens] - np.logaddexp.reduce(x, axis=1)
    found = jax.jit(jax.vmap(logprob_at))(logits, tokens)
    top, ids = jax.jit(jax.vmap(lambda row: top_logprobs(row, 3)))(logits)
    bound = unit * (np.log(vocab) + 8 + 512 + 2 * np.abs(expected))
    assert (np.abs(np.asarray(found, np.float64) - expected) <= bound).all()
    best = x[np.arange(len(rows)), np.asarray(ids)[:, 0]] - np.logaddexp.reduce(x, axis=1)
    assert (np.abs(np.asarray(top, np.float64)[:, 0] - best) <= bound).all()


PENALTIES = [
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.7),
    dict(presence_penalty=0.9),
    dict(frequency_penalty=-0.4),
    dict(
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.3,
        logit_bias={1: 2.0, 9: -np.inf, 3: -3.5},
    ),
]


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_penalties_and_bias_are_those_of_the_oracle(fields):
    logits = np.float32(np.random.default_rng(10).normal(size=12) * 2)
    prompt, output = [0, 1, 1, 5], [1, 2, 2, 2, 11]
    params = SamplingParams(**fields)
    counts = [jnp.asarray(np.bincount(ids, minlength=12), jnp.int32) for ids in (prompt, output)]
    settings = settings_from(params, request_key(0))
    found = jax.jit(adjust)(jnp.asarray(logits), settings, jnp.int32(5), *counts)
    np.testing.assert_allclose(
        found, oracle.adjusted(logits, params, 5, prompt, output), rtol=1e-6, atol=1e-6
    )


def test_no_end_token_is_sampled_before_min_tokens():
    logits = [[0.0, 9.0, 1.0, 2.0, 8.0]] * 5
    fields = dict(min_tokens=3, stop_token_ids=[4], temperature=0)
    tokens, _ = answers(logits, [fields] * 5, range(5), eos_ids=[1])
    np.testing.assert_array_equal(tokens, [3, 3, 3, 1, 1])
    ignoring = dict(min_tokens=3, ignore_eos=True, temperature=0)
    assert answers(logits, [ignoring], [0], eos_ids=[1])[0][0] == 1


def test_penalties_change_the_token_but_not_its_log_probability():
    logits = jnp.asarray([2.0, 1.9, 0.0])
    settings = settings_from(SamplingParams(temperature=0, frequency_penalty=0.5), request_key(0))
    counts = count_token(jnp.zeros(3, jnp.int32), jnp.int32(0))
    token, logprob = jax.jit(sample)(logits, settings, jnp.int32(1), None, counts)
    assert token == 1
    np.testing.assert_allclose(logprob, 1.9 - np.log(np.exp([2.0, 1.9, 0.0]).sum()), rtol=1e-6)


def test_a_bias_applies_to_the_last_id_and_padding_to_none():
    fields = [
        dict(temperature=0, logit_bias={299: 1.0}),
        dict(temperature=0),
        dict(temperature=0, logit_bias={5: 1.0}),
    ]
    tokens, _ = answers(np.zeros((3, 300)), fields, (0, 0, 0))
    np.testing.assert_array_equal(tokens, [299, 0, 5])


def test_no_token_is_sampled_if_every_token_is_masked():
    fields = [dict(temperature=0), dict(top_k=3, top_p=0.5), dict(top_p=0.5), dict(min_p=0.1)]
    masked = jnp.full((4, LARGE), -jnp.inf, jnp.float32)
    for settings in (stacked(fields), stacked([*fields[:3], dict()])):
        tokens, _ = batch(masked, settings, at(0, 0, 0, 0))
        assert (np.asarray(tokens) == LARGE).all()
        tokens, _ = batch(masked.at[1:3, 7].set(0), settings, at(0, 0, 0, 0))
        assert tokens.tolist() == [LARGE, 7, 7, LARGE]
    alone = jax.tree.map(jnp.asarray, settings_from(SamplingParams(), request_key(0)))
    assert jax.jit(sample)(masked[0], alone, jnp.int32(0))[0] == LARGE


def test_a_masked_token_is_never_drawn_and_every_other_one_is():
    logits = np.float32(np.where(np.arange(VOCAB) % 4, -np.inf, 0.0))
    tokens = draws(logits, [request_key(0)], temperature=100.0)
    assert set(np.asarray(tokens).tolist()) == set(range(0, VOCAB, 4))


def test_temperatures_below_the_minimum_are_greedy():
    fields = [dict(temperature=1e-30), dict(temperature=1e-6)]
    tokens, _ = answers([[0.0, 1e-3, 0.0]] * 2, fields, (0, 0))
    np.testing.assert_array_equal(tokens, [1, 1])


@pytest.mark.parametrize("vocab", [24, 32, 300])
def test_the_bitmask_masks_tokens_whose_bit_is_not_set(vocab):
    random = np.random.default_rng(vocab)
    logits, chosen = np.float32(random.normal(size=vocab)), random.random(vocab) < 0.3
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in np.flatnonzero(chosen):
        words[token // 32] |= np.uint32(1 << token % 32)
    got = apply_token_bitmask(jnp.asarray(logits), jnp.asarray(words))
    np.testing.assert_array_equal(got, np.where(chosen, logits, -np.inf))


def test_only_tokens_of_the_bitmask_are_drawn_with_unmasked_log_probabilities():
    logits = np.float32(np.random.default_rng(8).normal(size=(len(MIXED), 64)))
    allowed = np.full((len(MIXED), 2), 1 << 7 | 1 << 30, np.uint32)
    tokens, logprobs = batch(
        jnp.asarray(logits), stacked(MIXED), at(*range(len(MIXED))), bitmask=jnp.asarray(allowed)
    )
    assert set(tokens.tolist()) <= {7, 30, 39, 62}
    for row, token, logprob in zip(logits, tokens, logprobs, strict=True):
        np.testing.assert_allclose(logprob, row[token] - np.logaddexp.reduce(row), rtol=1e-5)
