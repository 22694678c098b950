"""How a decode is cut up: keys per block, warps, pipeline stages, and among how many programs a request's keys are split."""

import dataclasses

import numpy as np

from pallas_kernels.backend import cdiv

MOST_SPLITS = 64


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
    """Keys handled together, warps of a program, blocks in flight, and shares of a request's keys."""

    block_k: int
    warps: int
    stages: int
    splits: int


def blocks_for(
    *,
    requests: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    tokens: int,
    element: np.dtype,
    compute: np.dtype,
    page_size: int,
    cores: int = 132,
) -> DecodeBlocks:
    """Blocks for requests of up to `tokens` tokens on a GPU of so many cores."""
    block_k = 64 if head_dim <= 128 else 32
    programs = requests * kv_heads
    splits = max(1, min(cdiv(2 * cores, programs), cdiv(tokens, block_k), MOST_SPLITS))
    return DecodeBlocks(block_k=block_k, warps=2 if group <= 16 and compute.itemsize == 2 else 4, stages=3, splits=splits)
