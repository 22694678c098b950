"""Tables of tuned block sizes by device. Kernels fall back to their rule for other problems.

`tuned.json` in a kernel's folder maps a device kind to problem keys, and those to block sizes.
`python -m benchmarks.gpu --tune` writes it.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.backend import power_of_two

FILE_NAME = "tuned.json"
MAX_PROGRAMS = 4096  # larger grids share one key


def problem_key(*, head_dim: int, element: np.dtype, rows: int, programs: int) -> str:
    """Return the key of a problem in the table.

    Problems with the same key compile to the same kernel and have about the same grid size.

    Args:
      head_dim: channels per head.
      element: the element type of the cache.
      rows: query heads per block.
      programs: KV heads times requests (decode) or query tokens (prefill).
    """
    programs = min(power_of_two(programs), MAX_PROGRAMS)
    return (
        f"head_dim={power_of_two(head_dim)} element={element.name} rows={rows} programs={programs}"
    )


def tuned_blocks(kernel: str, key: str, device: str | None = None) -> dict[str, int] | None:
    """Return the tuned blocks of a problem, or None if it was not tuned.

    `device`: a device kind; by default that of the first device.
    """
    table = read_table(kernel)
    if not table:
        return None
    return table.get(device or jax.devices()[0].device_kind, {}).get(key)


def table_path(kernel: str) -> Path:
    """Return the path of a kernel's table. The file may not exist."""
    return Path(__file__).parent / kernel / FILE_NAME


@functools.cache
def read_table(kernel: str) -> dict[str, Any]:
    """Return block sizes by device and problem key; empty if the kernel has no table."""
    path = table_path(kernel)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
