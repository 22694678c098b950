"""The step that copies pages: what copy on write asks of the device (engine/kv_manager.py)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int32

from jfp8kv.cache.copy import copy_pages
from jfp8kv.cache.pool import KVPool
from jfp8kv.core.pytree import pytree

AT_ONCE = 64  # copies in one dispatch: the loop ends with the last that there is, so that one program serves all


@pytree
class Copies:
    """Page numbers, from and to; those past `count` are padding."""

    source: Int32[Array | np.ndarray, " copies"]
    target: Int32[Array | np.ndarray, " copies"]
    count: Int32[Array | np.ndarray, ""]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows there are, of one page each."""
        return self.source.shape[0], 1

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> "Copies":
        """At most `AT_ONCE` copies, `(from, to)`."""
        rows = np.zeros((2, AT_ONCE), np.int32)
        rows[:, : len(pairs)] = np.asarray(pairs, np.int32).reshape(-1, 2).T
        return cls(*rows, np.array(len(pairs), np.int32))


def dispatches(pairs: Sequence[tuple[int, int]]) -> Iterator[Copies]:
    """The same copies, in their order, as many at a time as go."""
    for first in range(0, len(pairs), AT_ONCE):
        yield Copies.of(pairs[first : first + AT_ONCE])


def copy(
    model: Any, weights: Any, scales: Any, copies: Copies, pages: KVPool
) -> tuple[None, KVPool]:
    """A step like others, though it meets no model: the pool after these copies."""
    return None, copy_pages(pages, copies.source, copies.target, copies.count)
