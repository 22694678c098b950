"""One way for each layer out of several: the best for every number of bytes there can be.

Losses of layers are taken to add up, as they do to first order while each is small. What is left is a knapsack with one item of
each group, and it is solved exactly: layer by layer, keeping only the sums that no other beats in both bytes and loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A choice for every layer, with the bytes and the loss it adds up to."""

    bytes: int
    loss: float
    ways: tuple[int, ...]


def pareto_front(costs: Sequence[Sequence[int]], losses: np.ndarray) -> list[Point]:
    """All choices that no other beats, from the fewest bytes to the least loss.

    Args:
      costs: bytes by layer and way.
      losses: `[layers, ways]`.
    """
    sums: list[tuple[int, float, tuple | None]] = [
        (0, 0.0, None)
    ]  # the last entry chains back: (way, entry before)
    for layer, row in enumerate(costs):
        ways = _unbeaten([(cost, float(losses[layer, way]), way) for way, cost in enumerate(row)])
        sums = _unbeaten(
            [
                (b + cost, loss + more, (way, chain))
                for b, loss, chain in sums
                for cost, more, way in ways
            ]
        )
    return [Point(b, loss, _unchained(chain)) for b, loss, chain in sums]


def _unbeaten(entries: list[tuple]) -> list[tuple]:
    """Those that no other beats in both, by ascending bytes; the first of equals."""
    kept: list[tuple] = []
    for entry in sorted(entries, key=lambda e: e[:2]):
        if not kept or entry[1] < kept[-1][1]:
            kept.append(entry)
    return kept


def _unchained(chain: tuple | None) -> tuple[int, ...]:
    ways = []
    while chain is not None:
        way, chain = chain
        ways.append(way)
    return tuple(reversed(ways))
