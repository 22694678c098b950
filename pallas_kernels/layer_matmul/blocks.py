"""Block sizes of `layer_matmul`."""

import dataclasses

import numpy as np

from pallas_kernels.backend import power_of_two

SPLIT_UNIT = 64  # a split has a multiple of this number of channels, for any tile size
MIN_SPLIT = 4 * SPLIT_UNIT  # channels; smaller splits are not worth a program
MAX_SPLITS = 8
# Rows of a tile, by bytes per element: the sums fill the registers of its warps.
MAX_ROWS = {2: 256, 4: 64}
TILE_BYTES = 128  # of a tile's row of the matrix: a cache line


@dataclasses.dataclass(frozen=True)
class MatmulBlocks:
    """Block sizes of `layer_matmul`. Tile sizes are powers of two.

    Attributes:
      block_out: output channels per tile.
      block_rows: rows per tile.
      block_in: input channels per tile.
      warps: warps per program.
      stages: pipeline stages, the tiles in flight.
      splits: parts of the input channels (split-K).
    """

    block_out: int
    block_rows: int
    block_in: int
    warps: int
    stages: int
    splits: int


def choose_blocks(
    *, rows: int, out: int, width: int, multiplied: np.dtype, stored: np.dtype, cores: int = 132
) -> MatmulBlocks:
    """Return blocks for a GPU with `cores` multiprocessors.

    Two programs per multiprocessor, or one that is twice as large, have enough loads in flight to
    hide memory latency. Every program reads all rows of its split from the L2 cache, so programs
    are large if there are many rows.

    `splits` depends only on the matrix, and with it the order in which the products of a row are
    summed: results do not depend on other rows (batch invariance).

    Args:
      rows: rows of `x`.
      out: output channels.
      width: input channels.
      multiplied: operand type.
      stored: type of the weights.
      cores: multiprocessors of the GPU.
    """
    splits = max(1, min(2 * cores * 64 // max(64, out), width // MIN_SPLIT, MAX_SPLITS))
    block_rows = min(max(16, power_of_two(rows)), MAX_ROWS[multiplied.itemsize])
    many = block_rows >= 64
    return MatmulBlocks(
        block_out=128 if many else 64,
        block_rows=block_rows,
        block_in=TILE_BYTES // stored.itemsize,
        warps=8 if many else 4,
        stages=4,
        splits=splits,
    )
