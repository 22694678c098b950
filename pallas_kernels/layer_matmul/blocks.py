"""How a product is cut up: outputs, rows and channels of a tile, warps, pipeline stages, and shares of the channels."""

import dataclasses

import numpy as np

from pallas_kernels.backend import power_of_two

UNIT = 64  # channels: a share has a whole number of them, whatever the tile
LEAST_SHARE = 4 * UNIT  # channels that are worth a program of their own
MOST_SPLITS = 8
MOST_ROWS = {
    2: 256,
    4: 64,
}  # of a tile, by bytes of an element: its sums fill the registers of its warps
TILE_BYTES = 128  # of a tile's row of the matrix: a line of the cache


@dataclasses.dataclass(frozen=True)
class MatmulBlocks:
    """Outputs, rows and channels of a tile, powers of two, warps of a program, tiles in flight, shares of the channels."""

    block_out: int
    block_rows: int
    block_in: int
    warps: int
    stages: int
    splits: int


def blocks_for(
    *, rows: int, out: int, width: int, multiplied: np.dtype, stored: np.dtype, cores: int = 132
) -> MatmulBlocks:
    """Blocks for a GPU of so many cores: two programs on each or one twice as large, for what a core has under way hides the
    memory's latency. Every program reads all rows of its share, from the L2 cache: large ones where there are many rows.

    `splits` depends on the matrix alone, and so does the order in which a row's products are summed: what stands beside a row
    does not change it.
    """
    splits = max(1, min(2 * cores * 64 // max(64, out), width // LEAST_SHARE, MOST_SPLITS))
    block_rows = min(max(16, power_of_two(rows)), MOST_ROWS[multiplied.itemsize])
    many = block_rows >= 64
    return MatmulBlocks(
        block_out=128 if many else 64,
        block_rows=block_rows,
        block_in=TILE_BYTES // stored.itemsize,
        warps=8 if many else 4,
        stages=4,
        splits=splits,
    )
