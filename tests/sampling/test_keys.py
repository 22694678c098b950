"""Request keys and random numbers against `jax.random`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.sampling.rng import exponential, fold_in, random_bits, request_key


def key_data(key) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_a_request_key_is_two_fold_ins_of_a_jax_random_key(seed):
    root = jax.random.key(np.uint32(seed), impl="threefry2x32")
    seeded = jax.random.fold_in(jax.random.fold_in(root, 0), 3)
    np.testing.assert_array_equal(
        request_key(seed, index=3, engine_seed=7, number=9), key_data(seeded)
    )
    unseeded = jax.random.fold_in(jax.random.fold_in(root, 10), 3)
    np.testing.assert_array_equal(
        request_key(None, index=3, engine_seed=seed, number=9), key_data(unseeded)
    )


def test_the_key_of_a_seeded_request_ignores_engine_seed_and_number():
    np.testing.assert_array_equal(
        request_key(5, engine_seed=1, number=2), request_key(5, engine_seed=3, number=4)
    )


def test_keys_of_different_seeds_samples_and_requests_differ():
    keys = [
        request_key(seed, index=index)
        for seed in (0, 1, 2**32, 2**40, 2**64 - 1)
        for index in range(4)
    ]
    keys += [
        request_key(None, engine_seed=seed, number=number) for seed in (0, 1) for number in range(4)
    ]
    assert len({tuple(map(int, key)) for key in keys}) == len(keys)


def test_fold_in_and_random_bits_agree_with_jax_random():
    words = request_key(42)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    np.testing.assert_array_equal(
        fold_in(jnp.asarray(words), jnp.int32(11)), key_data(jax.random.fold_in(key, 11))
    )
    ids = jnp.arange(1000, dtype=jnp.int32)
    np.testing.assert_array_equal(
        random_bits(jnp.asarray(words), ids), jax.random.bits(key, (1000,))
    )
    some = jnp.array([999, 3, 500], jnp.int32)
    np.testing.assert_array_equal(
        random_bits(jnp.asarray(words), some), jax.random.bits(key, (1000,))[some]
    )


def test_the_noise_is_exponential_with_mean_one_and_never_zero_or_infinite():
    noise = np.asarray(
        exponential(jnp.asarray(request_key(0)), jnp.arange(200_000, dtype=jnp.int32)), np.float64
    )
    assert noise.min() > 0 and noise.max() < 17
    # Mean and variance are 1; the variance of the squared deviation is 8. Five standard errors.
    assert abs(noise.mean() - 1) < 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * np.sqrt(8 / noise.size)
    # Kolmogorov-Smirnov: the statistic exceeds 1.95 / sqrt(n) with probability 0.001.
    steps = np.arange(1, noise.size + 1) / noise.size
    assert np.abs(steps - (1 - np.exp(-np.sort(noise)))).max() < 1.95 / np.sqrt(noise.size)
