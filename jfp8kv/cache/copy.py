"""Pages copied on the device, in place: what makes a branch of a text its own when it is first written to."""

import jax
from jax import lax
from jaxtyping import Array, Int

from jfp8kv.cache.pool import KVPool


def copy_pages(
    pages: KVPool,
    source: Int[Array, " copies"],
    target: Int[Array, " copies"],
    count: Int[Array, ""],
) -> KVPool:
    """Page number `target[i]` has what `source[i]` has, in all its slots and with its scales, for each `i` below `count`, one
    after another: a page may be copied again.

    Entries from `count` on are padding. A donated pool is changed in place, and one page is all the memory that this takes.
    (A gather and a scatter of all rows at once took that of all the copies, and on a CPU longer for few.)
    """

    def put(index: Array, pages: KVPool) -> KVPool:
        return jax.tree.map(
            lambda pool: _copied(pool, pages.num_pages, source[index], target[index]), pages
        )

    return lax.fori_loop(0, count, put, pages)


def _copied(pool: Array, num_pages: int, source: Int[Array, ""], target: Int[Array, ""]) -> Array:
    slots = pool.reshape(-1, num_pages, *pool.shape[1:])
    page = lax.dynamic_slice_in_dim(slots, source, 1, axis=1)
    return lax.dynamic_update_slice_in_dim(slots, page, target, axis=1).reshape(pool.shape)
