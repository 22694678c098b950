"""The Pareto front of mixed precision: for every size, the best choice of an option per layer.

The losses of layers are assumed to add up, which holds to first order if each is small. The problem
is then a multiple-choice knapsack. It is solved exactly, layer by layer: after each layer only the
sums that are not dominated in both bytes and loss remain.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """An option for each layer, with the total bytes and the total loss."""

    bytes: int
    loss: float
    options: tuple[int, ...]


class _Sum(NamedTuple):
    """A sum over the first layers, with the option of the last of them."""

    bytes: int
    loss: float
    option: int
    previous: "_Sum | None"  # the sum without that layer


def pareto_front(layer_bytes: Sequence[Sequence[int]], losses: np.ndarray) -> list[Point]:
    """Return all combinations that no other dominates, in ascending order of bytes.

    Args:
      layer_bytes: the bytes of each option, by layer.
      losses: the losses, `[layers, options]`.
    """
    sums = [_Sum(0, 0.0, -1, None)]
    for row, row_losses in zip(layer_bytes, losses.tolist(), strict=True):
        options = _front(
            _Sum(size, loss, option, None)
            for option, (size, loss) in enumerate(zip(row, row_losses, strict=True))
        )
        sums = _front(
            _Sum(total.bytes + each.bytes, total.loss + each.loss, each.option, total)
            for total in sums
            for each in options
        )
    return [Point(total.bytes, total.loss, _options(total)) for total in sums]


def _front(entries: Iterable[_Sum]) -> list[_Sum]:
    """Return the entries that no other dominates, in ascending order of bytes."""
    front: list[_Sum] = []
    for entry in sorted(entries, key=lambda each: (each.bytes, each.loss)):
        if not front or entry.loss < front[-1].loss:
            front.append(entry)
    return front


def _options(total: _Sum) -> tuple[int, ...]:
    """Return the option of each layer."""
    options = []
    while total.previous is not None:
        options.append(total.option)
        total = total.previous
    return tuple(reversed(options))
