"""Block sizes of `kv_write`."""

import dataclasses

import numpy as np

from pallas_kernels.backend import cdiv, power_of_two

WARP_BYTES = 32 * 16  # a warp stores 16 bytes per thread at once
MAX_WARPS = 4


@dataclasses.dataclass(frozen=True)
class WriteBlocks:
    """Block sizes of `kv_write`.

    Attributes:
      block_tokens: tokens per program, a power of two.
      block_heads: KV heads per program, a power of two.
      warps: warps per program.
    """

    block_tokens: int
    block_heads: int
    warps: int


def choose_blocks(
    *, requests: int, tokens: int, kv_heads: int, head_dim: int, element: np.dtype, cores: int = 132
) -> WriteBlocks:
    """Return blocks for a GPU with `cores` multiprocessors, which issue four warps at a time.

    A thread stores 16 bytes of keys and 16 of values. Blocks extend over tokens before heads, since
    the tokens of a head are contiguous in a page. If that does not occupy all multiprocessors, as
    in decode, a thread stores less, down to 4 bytes: then latency per thread determines the time.
    """
    rows = max(1, WARP_BYTES // (power_of_two(head_dim) * element.itemsize))
    block_tokens = min(power_of_two(tokens), MAX_WARPS * rows)
    block_heads = min(power_of_two(kv_heads), max(1, rows // block_tokens))
    warps = max(1, block_tokens * block_heads // rows)
    programs = requests * cdiv(tokens, block_tokens) * cdiv(kv_heads, block_heads)
    while warps < MAX_WARPS and programs * warps < 4 * cores:
        warps *= 2
    return WriteBlocks(block_tokens, block_heads, warps)
