"""Block sizes of `paged_prefill`: from the table of tuned sizes, or by rule."""

import dataclasses

import numpy as np

from pallas_kernels.backend import power_of_two
from pallas_kernels.kernel_inputs import HOPPER
from pallas_kernels.tuning import problem_key, tuned_blocks


@dataclasses.dataclass(frozen=True)
class PrefillBlocks:
    """Block sizes of `paged_prefill`.

    Attributes:
      block_m: query rows per block: tokens times query heads per KV head.
      block_k: keys per block.
      warps: warps per program.
      stages: pipeline stages, the blocks in flight.
    """

    block_m: int
    block_k: int
    warps: int
    stages: int


def prefill_key(
    *, queries: int, kv_heads: int, group: int, head_dim: int, element: np.dtype
) -> str:
    """Return the key of a problem in the table of tuned blocks."""
    return problem_key(
        head_dim=head_dim, element=element, rows=power_of_two(group), programs=queries * kv_heads
    )


def choose_blocks(
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
    """Return blocks for `queries` query tokens: those tuned for this device, or by rule.

    Args:
      queries: query tokens in the batch.
      kv_heads: KV heads.
      group: query heads per KV head.
      head_dim: channels per head.
      element: the element type of the cache.
      compute: operand type of the matmuls.
      capability: compute capability of the GPU. Before Hopper, tensor cores read both operands from
        registers: the rule takes the widest tile that does not spill them.
      dynamic: whether scales are dynamic.
    """
    if compute.itemsize == 4:
        return PrefillBlocks(block_m=16, block_k=32, warps=4, stages=2)
    key = prefill_key(
        queries=queries, kv_heads=kv_heads, group=group, head_dim=head_dim, element=element
    )
    if found := tuned_blocks("paged_prefill", key):
        return PrefillBlocks(**found)
    if capability < HOPPER:
        wide = head_dim <= 64 or (head_dim <= 128 and element.itemsize == 1 and not dynamic)
        return PrefillBlocks(
            block_m=64, block_k=64 if wide else 32, warps=4 if head_dim <= 128 else 8, stages=3
        )
    if head_dim > 128:
        return PrefillBlocks(block_m=64, block_k=32, warps=8, stages=3)
    if head_dim <= 64:
        return PrefillBlocks(block_m=128, block_k=64, warps=8, stages=3)
    if element.itemsize == 1:  # two programs of four warps alternate between matmul and conversion
        return PrefillBlocks(block_m=64, block_k=128, warps=4, stages=2)
    return PrefillBlocks(block_m=128, block_k=128, warps=8, stages=2)
