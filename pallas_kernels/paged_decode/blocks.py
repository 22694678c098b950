"""How a decode is cut up: keys per block, warps, pipeline stages, and among how many programs a request's keys are split."""

import dataclasses

import numpy as np

from pallas_kernels.backend import cdiv, power_of_two
from pallas_kernels.tuned import class_of, tuned

MOST_SPLITS = 128
PROGRAMS_A_CORE = 8  # of one warp or two: more gain nothing, fewer leave it waiting for memory


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
    """Keys handled together, warps of a program, blocks in flight, and shares of a request's keys."""

    block_k: int
    warps: int
    stages: int
    splits: int


def problem_class(*, requests: int, kv_heads: int, group: int, head_dim: int, element: np.dtype) -> str:
    """The class that blocks are tuned for."""
    rows = max(16, power_of_two(group))
    return class_of(head_dim=head_dim, element=element, rows=rows, programs=requests * kv_heads)


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
    """Blocks for requests of up to `tokens` tokens: those tuned for this device, or by rule for one of so many cores."""
    if compute.itemsize == 2:
        problem = problem_class(requests=requests, kv_heads=kv_heads, group=group, head_dim=head_dim, element=element)
        if found := tuned("paged_decode", problem):
            blocks = DecodeBlocks(**found)
            return dataclasses.replace(blocks, splits=max(1, min(blocks.splits, cdiv(tokens, blocks.block_k))))
    block_k, warps = 64 if head_dim <= 128 else 32, 2 if compute.itemsize == 2 else 4
    if element.itemsize == 1 and compute.itemsize == 2 and group <= 16 and head_dim <= 128:
        block_k, warps = 32 if head_dim > 64 else 64, 1
    wanted = round((PROGRAMS_A_CORE if warps == 1 else 4) * cores / (requests * kv_heads))
    splits = max(1, min(wanted, cdiv(tokens, block_k), MOST_SPLITS))
    return DecodeBlocks(block_k=block_k, warps=warps, stages=3, splits=splits)
