"""Reference of `layer_matmul` in float64, with a bound on the error of the kernel."""

from typing import Any

import numpy as np

from pallas_kernels.error_bound import OPERAND_ERRORS, TINY
from pallas_kernels.fp8 import FLOAT32
from pallas_kernels.layer_matmul.blocks import MAX_SPLITS

TRUNCATION = 2.0**-23  # relative error of an addition: tensor cores truncate instead of rounding


def layer_matmul_reference(x: Any, weights: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the result and the error bound, both float64 `[rows, out]`.

    Products of 16-bit numbers are exact in float32 unless they are flushed to zero. Products of
    float32 numbers are not. Every product is added once, in any order, and so is every split, which
    bounds the number of truncated additions per output.
    """
    x = np.asarray(x)
    w = np.asarray(weights)[layer].astype(x.dtype).astype(np.float64)
    wide = x.astype(np.float64)
    additions = wide.shape[1] + MAX_SPLITS
    error = additions * TRUNCATION / (1 - additions * TRUNCATION)
    if x.dtype == FLOAT32:
        error += OPERAND_ERRORS[FLOAT32].relative
    bound = error * (np.abs(wide) @ np.abs(w).T) + additions * TINY
    return wide @ w.T, bound
