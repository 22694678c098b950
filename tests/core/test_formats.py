"""The cast and its inverse, against ml_dtypes, for every code and every rounding tie."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jfp8kv.core import formats
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    FORMATS,
    decode,
    decode_tile,
    encode,
    encode_numpy,
)

FP8 = [E4M3, E5M2]
HALVES = [BFLOAT16, FLOAT16]
ids = {"argvalues": FP8, "ids": [f.name for f in FP8]}


def values_of_every_code(fmt) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(fmt.dtype).astype(np.float32)


def interesting(fmt) -> np.ndarray:
    """Return all finite values, all ties, and the float32 on both sides of each tie."""
    values = values_of_every_code(fmt)
    values = np.unique(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1.17e-38, 3.4e38, -3.4e38]
    beyond = fmt.largest * np.array([1, 1.001, 1.03, 1.0357, 1.04, 1.07, 2, -1.001, -2])
    up, down = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))
    return np.concatenate([values, ties, up, down, edges, beyond]).astype(np.float32)


@pytest.mark.parametrize("fmt", **ids)
def test_the_properties_of_a_format_match_ml_dtypes(fmt) -> None:
    info = ml_dtypes.finfo(fmt.dtype)
    assert (fmt.largest, fmt.smallest_normal, fmt.smallest_subnormal) == (
        float(info.max), float(info.smallest_normal), float(info.smallest_subnormal)
    )  # fmt: skip
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (info.nexp, info.nmant)


def test_the_largest_finite_values_match_the_ocp_specification() -> None:
    assert (E4M3.largest, E5M2.largest) == (448.0, 57344.0)


@pytest.mark.parametrize("fmt", **ids)
def test_every_code_decodes_like_ml_dtypes_with_the_sign_of_zero_and_nan(
    fmt,
) -> None:
    got = np.asarray(jax.jit(lambda u: decode(u, fmt))(np.arange(256, dtype=np.uint8)))
    want = values_of_every_code(fmt)
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("fmt", **ids)
def test_encoding_is_bit_equal_to_numpy_on_codes_ties_and_edges(fmt) -> None:
    x = interesting(fmt)
    assert np.array_equal(np.asarray(jax.jit(lambda v: encode(v, fmt))(x)), encode_numpy(x, fmt))


@pytest.mark.parametrize("fmt", [*FP8, *HALVES], ids=lambda f: f.name)
def test_encoding_is_bit_equal_to_numpy_on_random_float32_bits(fmt) -> None:
    x = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    x = (
        x[(np.abs(x) > 1.2e-38) | (x == 0)] if fmt is BFLOAT16 else x
    )  # bfloat16 rounding of float32 subnormals
    x = x[~np.isnan(x)]  # 16-bit NaN payloads are not preserved by any cast
    assert np.array_equal(np.asarray(jax.jit(lambda v: encode(v, fmt))(x)), encode_numpy(x, fmt))


@pytest.mark.parametrize("fmt", **ids)
def test_every_finite_code_survives_decoding_and_encoding(fmt) -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[np.isfinite(values_of_every_code(fmt))]
    assert np.array_equal(np.asarray(encode(decode(jnp.asarray(codes), fmt), fmt)), codes)


@pytest.mark.parametrize("fmt", [*FP8, *HALVES], ids=lambda f: f.name)
def test_values_beyond_the_largest_saturate_and_nan_stays_nan(fmt) -> None:
    x = np.array(
        [fmt.largest * 1.5 if fmt is not BFLOAT16 else np.inf, np.inf, -np.inf, np.nan], np.float32
    )
    got = np.asarray(decode(encode(jnp.asarray(x), fmt), fmt))
    assert np.array_equal(
        got, np.array([fmt.largest, fmt.largest, -fmt.largest, np.nan], np.float32), equal_nan=True
    )


@pytest.mark.parametrize("fmt", **ids)
def test_the_error_of_a_scaled_value_stays_within_half_a_step(fmt) -> None:
    """|x - x̂| <= max(|x| / 2**(M+1), scale * smallest_subnormal / 2) for |x| <= largest * scale."""
    rng = np.random.default_rng(1)
    for scale in (2.0**-9, 0.37, 5.0):
        x = (
            rng.uniform(-1, 1, 20_000) * fmt.largest * scale * rng.choice([1, 1e-3, 1e-6], 20_000)
        ).astype(np.float32)
        got = (
            np.asarray(decode(encode(jnp.asarray(x / np.float32(scale)), fmt), fmt)).astype(
                np.float64
            )
            * scale
        )
        bound = np.maximum(
            np.abs(x) / 2 ** (fmt.mantissa_bits + 1), scale * fmt.smallest_subnormal / 2
        )
        assert np.all(
            np.abs(got - x) <= bound * (1 + 2.0**-20)
        )  # the float32 division itself rounds


def test_the_derived_bound_for_e4m3_is_the_published_one() -> None:
    assert 2 ** (E4M3.mantissa_bits + 1) == 16 and E4M3.smallest_subnormal / 2 == 1 / 1024


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_tile_times_its_factor_is_the_value(fmt) -> None:
    x = np.random.default_rng(2).normal(size=1000).astype(np.float32)
    bits = encode(jnp.asarray(x), fmt)
    assert np.array_equal(
        np.asarray(decode_tile(bits, fmt)) * np.float32(fmt.tile_factor),
        np.asarray(decode(bits, fmt)),
    )


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_stored_bits_are_returned_as_the_dtype_of_the_format(fmt) -> None:
    bits = encode(jnp.ones(3, jnp.float32), fmt)
    assert formats.as_values(bits, fmt).dtype == fmt.dtype and np.all(
        np.asarray(formats.as_values(bits, fmt)) == 1
    )


def test_fp8_means_e4m3_and_an_unknown_name_gets_the_list() -> None:
    assert formats.kv_format("fp8") is E4M3 and formats.kv_format("float32") is FLOAT32
    with pytest.raises(ConfigError, match=r"'fp8_e4m4'.*'fp8_e5m2'.*Did you mean 'fp8_e4m3'"):
        formats.kv_format("fp8_e4m4")
