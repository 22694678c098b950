"""How a decode is cut up: keys per block, warps, pipeline stages, and among how many programs a request's keys are split."""

import dataclasses
import math

import numpy as np

from pallas_kernels.backend import cdiv, power_of_two
from pallas_kernels.tuned import class_of, tuned

MOST_SPLITS = 128
PROGRAMS_A_CORE = {
    1: 8,
    2: 4,
    4: 4,
}  # by their warps: with fewer a multiprocessor waits for memory, with more some wait for it


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
    """Keys handled together, warps of a program, blocks in flight, and shares of a request's keys."""

    block_k: int
    warps: int
    stages: int
    splits: int


def problem_class(
    *, requests: int, kv_heads: int, group: int, head_dim: int, element: np.dtype
) -> str:
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
        problem = problem_class(
            requests=requests, kv_heads=kv_heads, group=group, head_dim=head_dim, element=element
        )
        if found := tuned("paged_decode", problem):
            blocks = DecodeBlocks(**found)
            return dataclasses.replace(
                blocks, splits=max(1, min(blocks.splits, cdiv(tokens, blocks.block_k)))
            )
    block_k, warps = 64 if head_dim <= 128 else 32, 2
    if compute.itemsize == 4 or (group > 16 and element.itemsize == 2):
        warps = 4
    elif element.itemsize == 1 and group <= 16 and head_dim <= 128:
        block_k, warps = 64 if head_dim <= 64 else 32, 1
    splits = splits_for(requests * kv_heads, a_core=PROGRAMS_A_CORE[warps], cores=cores)
    return DecodeBlocks(block_k, warps, stages=3, splits=max(1, min(splits, cdiv(tokens, block_k))))


def splits_for(programs: int, *, a_core: int, cores: int) -> int:
    """Shares of a request's keys that make about `a_core` programs a multiprocessor of so many: a power of two, for others were
    slower (docs/log.md, 2026-11-28)."""
    return min(MOST_SPLITS, 1 << max(0, round(math.log2(a_core * cores / programs))))
