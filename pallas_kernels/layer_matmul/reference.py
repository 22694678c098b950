"""What `layer_matmul` computes, in float64, and how far from it the kernel may be."""

from typing import Any

import numpy as np

from pallas_kernels.elements import FLOAT32
from pallas_kernels.layer_matmul.blocks import MOST_SPLITS
from pallas_kernels.precision import OPERANDS, TINY

CUT = 2.0**-23  # what a sum may lose of itself: tensor cores cut digits off where others round


def layer_matmul_reference(x: Any, weights: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Product and error bound, both float64 `[rows, out]`.

    Products of 16-bit numbers are exact in float32 unless they are flushed to zero; those of float32 numbers are not. Every
    product is added once, in whatever order, and so is every share: at most so many sums lose digits on the way to an output.
    """
    x = np.asarray(x)
    w = np.asarray(weights)[layer].astype(x.dtype).astype(np.float64)
    wide = x.astype(np.float64)
    sums = wide.shape[1] + MOST_SPLITS
    lost = sums * CUT / (1 - sums * CUT) + (
        OPERANDS[FLOAT32].relative if x.dtype == FLOAT32 else 0.0
    )
    return wide @ w.T, lost * (np.abs(wide) @ np.abs(w).T) + sums * TINY
