"""How a prefill is cut up: rows of queries and keys handled together, warps, pipeline stages."""

import dataclasses

import numpy as np

from pallas_kernels.backend import power_of_two
from pallas_kernels.options import HOPPER
from pallas_kernels.tuned import class_of, tuned


@dataclasses.dataclass(frozen=True)
class PrefillBlocks:
    """Rows (query tokens times heads of a group) and keys handled together, warps of a program, blocks in flight."""

    block_m: int
    block_k: int
    warps: int
    stages: int


def problem_class(
    *, queries: int, kv_heads: int, group: int, head_dim: int, element: np.dtype
) -> str:
    """The class that blocks are tuned for."""
    return class_of(
        head_dim=head_dim, element=element, rows=power_of_two(group), programs=queries * kv_heads
    )


def blocks_for(
    *,
    queries: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    element: np.dtype,
    compute: np.dtype,
    capability: tuple[int, int],
    dynamic: bool = False,
) -> PrefillBlocks:
    """Blocks for so many query tokens: those tuned for this device, or by rule. Before Hopper, whose tensor cores read shared
    memory, both operands take registers: the widest tile that does not spill them."""
    if compute.itemsize == 4:
        return PrefillBlocks(block_m=16, block_k=32, warps=4, stages=2)
    problem = problem_class(
        queries=queries, kv_heads=kv_heads, group=group, head_dim=head_dim, element=element
    )
    if found := tuned("paged_prefill", problem):
        return PrefillBlocks(**found)
    if capability < HOPPER:
        wide = head_dim <= 64 or (
            head_dim <= 128 and element.itemsize == 1 and not dynamic
        )  # how many keys
        return PrefillBlocks(
            block_m=64, block_k=64 if wide else 32, warps=4 if head_dim <= 128 else 8, stages=3
        )
    if head_dim > 128:
        return PrefillBlocks(block_m=64, block_k=32, warps=8, stages=3)
    if head_dim <= 64:
        return PrefillBlocks(block_m=128, block_k=64, warps=8, stages=3)
    if element.itemsize == 1:  # two programs of four warps take turns multiplying and converting
        return PrefillBlocks(block_m=64, block_k=128, warps=4, stages=2)
    return PrefillBlocks(block_m=128, block_k=128, warps=8, stages=2)
