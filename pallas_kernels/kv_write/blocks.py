"""How a write is cut up: tokens and heads of a program, and its warps."""

import dataclasses

import numpy as np

from pallas_kernels.backend import cdiv, power_of_two

WIDE = 32 * 16  # bytes a warp stores at once, 16 a thread
MOST_WARPS = 4


@dataclasses.dataclass(frozen=True)
class WriteBlocks:
    """Tokens and heads handled together, powers of two, and warps of a program."""

    block_tokens: int
    block_heads: int
    warps: int


def blocks_for(
    *, requests: int, tokens: int, kv_heads: int, head_dim: int, element: np.dtype, cores: int = 132
) -> WriteBlocks:
    """Blocks for a GPU of so many cores, which issue four warps at a time each.

    Threads have 16 bytes of keys and of values to store, tokens before heads, for those of one head lie together in a page.
    Where that leaves the cores idle, as a decode does, threads have less, down to 4 bytes: time is then what one of them takes.
    """
    rows = max(1, WIDE // (power_of_two(head_dim) * element.itemsize))
    block_tokens = min(power_of_two(tokens), MOST_WARPS * rows)
    block_heads = min(power_of_two(kv_heads), max(1, rows // block_tokens))
    warps = max(1, block_tokens * block_heads // rows)
    programs = requests * cdiv(tokens, block_tokens) * cdiv(kv_heads, block_heads)
    while warps < MOST_WARPS and programs * warps < 4 * cores:
        warps *= 2
    return WriteBlocks(block_tokens, block_heads, warps)
