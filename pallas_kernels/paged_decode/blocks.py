"""Block sizes of `paged_decode`: from the table of tuned sizes, or by rule."""

import dataclasses
import math

import numpy as np

from pallas_kernels.backend import cdiv, power_of_two
from pallas_kernels.tuning import problem_key, tuned_blocks

MAX_SPLITS = 128
# Programs per multiprocessor by warps per program. Fewer do not hide memory latency, more leave a
# partial wave.
PROGRAMS_PER_CORE = {1: 8, 2: 4, 4: 4}


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
    """Block sizes of `paged_decode`.

    Attributes:
      block_k: keys per block.
      warps: warps per program.
      stages: pipeline stages, the blocks in flight.
      splits: programs per request and KV head; each handles a part of the keys (flash decoding).
    """

    block_k: int
    warps: int
    stages: int
    splits: int


def decode_key(
    *, requests: int, kv_heads: int, group: int, head_dim: int, element: np.dtype
) -> str:
    """Return the key of a problem in the table of tuned blocks."""
    rows = max(16, power_of_two(group))
    return problem_key(head_dim=head_dim, element=element, rows=rows, programs=requests * kv_heads)


def choose_blocks(
    *,
    requests: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    tokens: int,
    element: np.dtype,
    compute: np.dtype,
    cores: int = 132,
) -> DecodeBlocks:
    """Return blocks for requests of up to `tokens` tokens: those tuned for this device, or by rule.

    Args:
      requests: requests in the batch.
      kv_heads: KV heads.
      group: query heads per KV head.
      head_dim: channels per head.
      tokens: the longest possible request.
      element: the element type of the cache.
      compute: operand type of the matmuls.
      cores: multiprocessors of the GPU, for the rule.
    """
    if compute.itemsize == 2:
        key = decode_key(
            requests=requests, kv_heads=kv_heads, group=group, head_dim=head_dim, element=element
        )
        if found := tuned_blocks("paged_decode", key):
            blocks = DecodeBlocks(**found)
            splits = max(1, min(blocks.splits, cdiv(tokens, blocks.block_k)))
            return dataclasses.replace(blocks, splits=splits)
    block_k = 64 if head_dim <= 128 else 32
    warps = 2
    if compute.itemsize == 4 or (group > 16 and element.itemsize == 2):
        warps = 4
    elif element.itemsize == 1 and group <= 16 and head_dim <= 128:
        block_k = 64 if head_dim <= 64 else 32
        warps = 1
    splits = choose_splits(
        requests * kv_heads, programs_per_core=PROGRAMS_PER_CORE[warps], cores=cores
    )
    return DecodeBlocks(block_k, warps, stages=3, splits=max(1, min(splits, cdiv(tokens, block_k))))


def choose_splits(programs: int, *, programs_per_core: int, cores: int) -> int:
    """Return the number of splits that gives about `programs_per_core` programs per multiprocessor.

    A power of two: others were slower (docs/log.md, 2026-11-28).
    """
    return min(MAX_SPLITS, 1 << max(0, round(math.log2(programs_per_core * cores / programs))))
