"""How a prefill is cut up: rows of queries and keys handled together, warps, pipeline stages."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PrefillBlocks:
    """Rows (query tokens times heads of a group) and keys handled together, warps of a program, blocks in flight."""

    block_m: int
    block_k: int
    warps: int
    stages: int


def blocks_for(*, head_dim: int, compute: np.dtype) -> PrefillBlocks:
    """Blocks for this size of heads."""
    if compute.itemsize == 4:
        return PrefillBlocks(block_m=32, block_k=16, warps=4, stages=2)
    return PrefillBlocks(block_m=128 if head_dim <= 128 else 64, block_k=64 if head_dim <= 128 else 32, warps=8, stages=3)
