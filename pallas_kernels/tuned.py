"""Block sizes that were found by trying, by device: what a kernel takes before it goes by its rule.

`tuned.json` beside a kernel maps a device's kind to classes of problems, and those to blocks. `python -m benchmarks.gpu --tune`
writes it. A device or class that nobody tried is not in it.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.backend import power_of_two

NAME = "tuned.json"
MOST_PROGRAMS = 4096


def class_of(*, head_dim: int, element: np.dtype, rows: int, programs: int) -> str:
    """The class of a problem: sizes that compile to the same kernel, and about as many programs.

    `rows`: query heads handled together; `programs`: requests (in prefill: query tokens) times KV heads.
    """
    programs = min(power_of_two(programs), MOST_PROGRAMS)
    return (
        f"head_dim={power_of_two(head_dim)} element={element.name} rows={rows} programs={programs}"
    )


def tuned(kernel: str, problem: str, device: str | None = None) -> dict[str, int] | None:
    """Blocks for a class on a device (None: the one there is), or None where it was not tried."""
    table = read(kernel)
    if not table:
        return None
    return table.get(device or jax.devices()[0].device_kind, {}).get(problem)


def path_of(kernel: str) -> Path:
    """The table of a kernel, which may not exist."""
    return Path(__file__).parent / kernel / NAME


@functools.cache
def read(kernel: str) -> dict[str, Any]:
    """Blocks by device and class; empty where no device was tried."""
    path = path_of(kernel)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
