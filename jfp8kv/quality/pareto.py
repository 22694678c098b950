"""One option per layer out of several: the best combination for every total size.

The losses of layers are assumed to add up, which holds to first order while each is small. That
leaves a knapsack with one item of each group. It is solved exactly, layer by layer, keeping only
the sums that no other sum beats in both bytes and loss.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """An option for every layer, with the total bytes and loss."""

    bytes: int
    loss: float
    options: tuple[int, ...]


class _Sum(NamedTuple):
    bytes: int
    loss: float
    option: int
    previous: "_Sum | None"  # the sum over the layers before


def pareto_front(layer_bytes: Sequence[Sequence[int]], losses: np.ndarray) -> list[Point]:
    """Return all combinations that no other beats, from the fewest bytes to the least loss.

    Args:
      layer_bytes: bytes by layer and option.
      losses: `[layers, options]`.
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
    """Return the entries that no other beats in both, by ascending bytes."""
    front: list[_Sum] = []
    for entry in sorted(entries, key=lambda each: (each.bytes, each.loss)):
        if not front or entry.loss < front[-1].loss:
            front.append(entry)
    return front


def _options(total: _Sum) -> tuple[int, ...]:
    options = []
    while total.previous is not None:
        options.append(total.option)
        total = total.previous
    return tuple(reversed(options))
