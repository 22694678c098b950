"""Copy pages on the device in place, for copy-on-write (engine/kv_manager.py)."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int32

from jfp8kv.cache.pool import KVPool
from jfp8kv.core.pytree import AnyArray, pytree

MAX_COPIES = 64  # per dispatch; the loop ends after the last copy, so one program suffices


@pytree
class PageCopies:
    """Pages to copy, in this order. Entries from `count` on are padding."""

    source: Int32[AnyArray, " copies"]
    target: Int32[AnyArray, " copies"]
    count: Int32[AnyArray, ""]

    @property
    def shape(self) -> tuple[int, int]:
        """The padded number of copies, and 1."""
        return self.source.shape[0], 1

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> "PageCopies":
        """Return the copies of at most `MAX_COPIES` pairs `(source, target)`."""
        rows = np.zeros((2, MAX_COPIES), np.int32)
        rows[:, : len(pairs)] = np.asarray(pairs, np.int32).reshape(-1, 2).T
        return cls(source=rows[0], target=rows[1], count=np.array(len(pairs), np.int32))


def copy_batches(pairs: Sequence[tuple[int, int]]) -> Iterator[PageCopies]:
    """Yield the copies of all pairs `(source, target)` in order, at most `MAX_COPIES` at a time."""
    for first in range(0, len(pairs), MAX_COPIES):
        yield PageCopies.of(pairs[first : first + MAX_COPIES])


def copy_pages(
    pages: KVPool,
    source: Int[Array, " copies"],
    target: Int[Array, " copies"],
    count: Int[Array, ""],
) -> KVPool:
    """Copy page `source[i]` to page `target[i]`, scales included, for each `i` below `count`.

    Copies run one after another, so a copied page may be copied again. A donated pool is updated in
    place, and the temporaries are one page. (A gather and a scatter of all rows at once needed the
    memory of all copies, and took longer for few copies on a CPU.)
    """

    def copy(index: Array, pages: KVPool) -> KVPool:
        copied: KVPool = jax.tree.map(
            lambda array: _copy_page(array, pages.num_pages, source[index], target[index]), pages
        )
        return copied

    copied: KVPool = lax.fori_loop(0, count, copy, pages)
    return copied


def _copy_page(
    array: Array, num_pages: int, source: Int[Array, ""], target: Int[Array, ""]
) -> Array:
    """Copy one page in all layer slots of an array of the pool."""
    slots = array.reshape(-1, num_pages, *array.shape[1:])
    page = lax.dynamic_slice_in_dim(slots, source, 1, axis=1)
    return lax.dynamic_update_slice_in_dim(slots, page, target, axis=1).reshape(array.shape)
