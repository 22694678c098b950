"""The FP8 cast on device against the NumPy cast: equal bits at every edge case."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jfp8kv.cache.scales import exponent_inverse
from jfp8kv.cache.scales import token_head_exponent as library_exponent
from jfp8kv.core.formats import E4M3, E5M2, FLOAT32, FORMATS, encode_numpy
from jfp8kv.core.formats import encode as library_encode
from pallas_kernels.fp8 import encode, exact_exp2, token_head_exponent

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
each_fp8 = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def both_signs(x: np.ndarray) -> np.ndarray:
    """Return the numbers and their negatives, also of NaN and zero."""
    return np.concatenate([x, -x]).astype(np.float32)


def edges() -> np.ndarray:
    info = np.finfo(np.float32)
    return np.array(
        [0, np.inf, np.nan, info.smallest_subnormal, 1e-40, info.smallest_normal, 1, info.max],
        np.float32,
    )


def around_every_tie(fmt) -> np.ndarray:
    """Return all finite values, the midpoints between them, and the adjacent float32 of each."""
    values = np.arange(2 ** (8 * fmt.itemsize - 1), dtype=fmt.storage_dtype).view(fmt.dtype)
    with np.errstate(invalid="ignore"):
        values = values[np.isfinite(values)].astype(np.float64)
    last = values[-1] + (values[-1] - values[-2]) / 2  # the midpoint to the first overflow
    exact = np.concatenate(
        [values, (values[1:] + values[:-1]) / 2, [last, 2 * fmt.largest]]
    ).astype(np.float32)
    return np.concatenate(
        [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    )


def every_half(dtype) -> np.ndarray:
    """Return every 16-bit value, with quiet NaNs: NumPy preserves NaN payloads, GPUs do not."""
    codes = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        nan = np.isnan(codes.view(dtype))
    values = np.where(nan, np.uint16(0), codes).view(dtype).astype(np.float32)
    return np.where(nan, np.where(codes >> 15, -np.float32(np.nan), np.float32(np.nan)), values)


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(np.uint32) if x.dtype == np.float32 else x


def check(x: np.ndarray, fmt) -> None:
    """Compare with NumPy, and with the library on this device, which may flush subnormals."""
    got = bits(jax.jit(lambda x: encode(x, fmt.dtype))(x))
    np.testing.assert_array_equal(got, bits(encode_numpy(x, fmt)))
    subnormal = (np.abs(x) < np.finfo(np.float32).smallest_normal) & (x != 0)
    np.testing.assert_array_equal(
        got[~subnormal], bits(library_encode(jnp.asarray(x), fmt))[~subnormal]
    )


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f is not FLOAT32], ids=lambda f: f.name
)
def test_every_value_and_tie_and_their_neighbours_encode_as_in_the_library(fmt):
    with np.errstate(over="ignore"):
        check(both_signs(np.concatenate([around_every_tie(fmt), edges()])), fmt)


@each_format
@pytest.mark.parametrize("half", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_value_encodes_as_in_the_library(fmt, half):
    x = every_half(half)
    check(x[np.isfinite(x)] if fmt is FLOAT32 else x, fmt)


@each_format
def test_random_bits_encode_as_in_the_library(fmt):
    x = np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32).view(np.float32)
    check(x[np.isfinite(x)], fmt)


def test_a_float32_is_stored_unchanged():
    x = both_signs(edges())
    np.testing.assert_array_equal(bits(encode(jnp.asarray(x), np.dtype(np.float32))), bits(x))


@each_fp8
def test_a_nan_of_any_payload_stays_nan_with_its_sign(fmt):
    payload = np.concatenate([2 ** np.arange(23), [2**23 - 1]]).astype(np.uint32)
    for sign in (0, 0x80):
        x = (payload | np.uint32(0x7F800000 | sign << 24)).view(np.float32)
        assert set(np.asarray(encode(jnp.asarray(x), fmt.dtype)).tolist()) == {
            int(encode_numpy(np.full(1, np.nan), fmt)[0]) | sign
        }


@each_fp8
def test_token_head_exponents_equal_those_of_the_library(fmt):
    """Rows with an amax at, next to and far from a power of two times the largest value."""
    with np.errstate(over="ignore"):
        limits = (fmt.largest * 2.0 ** np.arange(-170, 120)).astype(np.float32)
    amax = np.concatenate(
        [
            limits,
            np.nextafter(limits, np.float32(np.inf)),
            np.nextafter(limits, np.float32(0)),
            edges(),
        ]
    )
    rows = np.zeros((len(amax), 8), np.float32)
    rows[:, 3] = amax
    rows[:, 5] = -amax / 2
    special = rows.copy()
    special[:, 0], special[:, 1], special[:, 7] = np.nan, np.inf, -np.inf
    random = np.random.default_rng(0).integers(0, 2**32, (4096, 16), np.uint32).view(np.float32)
    for x in (rows, special, random):
        got = np.asarray(jax.jit(lambda x: token_head_exponent(x, fmt.dtype))(x))
        np.testing.assert_array_equal(got, np.asarray(library_exponent(jnp.asarray(x), fmt)))


@each_fp8
def test_the_factor_of_a_row_is_the_inverse_scale_of_the_library(fmt):
    exponent = jnp.arange(1, 248, dtype=jnp.int32)
    np.testing.assert_array_equal(
        exact_exp2(127 - exponent), exponent_inverse(exponent.astype(jnp.uint8))
    )
