"""Decoding of every code of every element type against ml_dtypes, and exact powers of two."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8 import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    compute_dtype,
    decode,
    exact_exp2,
    is_fp8,
)

BITS = {1: np.uint8, 2: np.uint16}


def same(got: jax.Array, want: np.ndarray) -> None:
    """Check for equal values and signs of zeros; any NaN equals any other."""
    with np.errstate(invalid="ignore"):  # from converting a signalling NaN
        got, want = np.asarray(got).astype(np.float64), want.astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    got, want = (np.where(np.isnan(x), 0.0, x) for x in (got, want))
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("stored", ["bits", "values"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "shifted"])
@pytest.mark.parametrize("element", [E4M3, E5M2, BFLOAT16, FLOAT16], ids=str)
def test_every_code_decodes_to_its_value(element, native, stored) -> None:
    codes = np.arange(256**element.itemsize, dtype=BITS[element.itemsize])
    given = jnp.asarray(codes if stored == "bits" else codes.view(element))
    got = jax.jit(lambda bits: decode(bits, element, native_e4m3=native))(given)
    want = codes.view(element)
    assert got.dtype == (FLOAT16 if is_fp8(element) else element)
    same(got, want)


def test_shifted_decoding_outside_jit_gives_the_same_values() -> None:
    """Without `jit`, each operation rounds separately."""
    codes = np.arange(256, dtype=np.uint8)
    same(decode(jnp.asarray(codes), E4M3, native_e4m3=False), codes.view(E4M3))


def test_float32_decodes_unchanged() -> None:
    x = jnp.float32([0.0, -1.5, np.inf, 1e-30])
    assert np.array_equal(decode(x, FLOAT32, native_e4m3=True), x)


def test_powers_of_two_are_exact_down_to_the_smallest_normal_number() -> None:
    exponents = np.arange(-300, 128, dtype=np.int32)
    want = np.ldexp(np.float64(1), np.maximum(exponents, -126))
    assert np.array_equal(
        np.asarray(jax.jit(exact_exp2)(jnp.asarray(exponents))).astype(np.float64), want
    )


def test_matmul_operands_are_float32_if_either_input_is() -> None:
    for element in (E4M3, E5M2, BFLOAT16, FLOAT16, FLOAT32):
        assert compute_dtype(element, FLOAT32) == FLOAT32
        for query in (BFLOAT16, FLOAT16):
            want = FLOAT32 if element == FLOAT32 else BFLOAT16 if element == BFLOAT16 else FLOAT16
            assert compute_dtype(element, query) == want


def test_importing_the_kernels_does_not_import_pallas() -> None:
    """Without a GPU only the FP8 cast is used."""
    code = "import sys, pallas_kernels; sys.exit('jax.experimental.pallas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
