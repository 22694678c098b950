"""A page number copied is the same bytes in every layer, whatever layers keep; nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.cache.copy import copy_pages
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool, read, write
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import BFLOAT16, E4M3, E5M2, FLOAT32

PAGES, SIZE, HEADS, DIM = 6, 4, 2, 8
KINDS = {
    "e4m3": [LayerCacheSpec(E4M3)] * 3,
    "e5m2 with scales by token and head": [LayerCacheSpec(E5M2, dynamic=True)] * 3,
    "bfloat16": [LayerCacheSpec(BFLOAT16)] * 3,
    "in planes of bytes": [
        LayerCacheSpec(E4M3, dynamic=True),
        LayerCacheSpec(BFLOAT16),
        LayerCacheSpec(FLOAT32),
        LayerCacheSpec(E5M2),
    ],
}
each_kind = pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
each_layout = pytest.mark.parametrize(
    "keys_transposed", [True, False], ids=["keys transposed", "keys as values"]
)


def pool(kinds: list[LayerCacheSpec], windows: list[int], keys_transposed: bool) -> KVPool:
    """A pool of random bits."""
    layout = PoolLayout.of(
        kinds, LayerGroups.of(windows, slot_widths(kinds)), keys_transposed=keys_transposed
    )
    pages = new_pool(layout, num_pages=PAGES, page_size=SIZE, kv_heads=HEADS, head_dim=DIM)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 256, x.shape).astype(x.dtype)), pages)


@each_kind
@each_layout
@pytest.mark.parametrize("windows", ["one group", "a group for each window"])
def test_copies_are_made_one_after_another_and_touch_nothing_else(
    kinds, keys_transposed, windows
) -> None:
    pages = pool(
        kinds, [0] * len(kinds) if windows == "one group" else [*range(len(kinds))], keys_transposed
    )
    pairs = [(1, 4), (4, 0), (5, 4)]
    want = [np.array(x) for x in jax.tree.leaves(pages)]
    for each in want:
        for first in range(0, each.shape[0], PAGES):
            for source, target in pairs:
                each[first + target] = each[first + source]
    padded = jnp.int32([*pairs, (2, 3)]).T
    got = jax.jit(copy_pages)(pages, padded[0], padded[1], jnp.int32(len(pairs)))
    for each, array in zip(want, jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(each, np.asarray(array))


@each_kind
def test_a_text_reads_the_same_from_a_copy_of_its_page(kinds) -> None:
    pages = pool(kinds, [0] * len(kinds), True)
    scales = LayerScales.of(
        KVScales.unit(len(kinds)), layers=len(kinds), kv_heads=HEADS, head_dim=DIM
    )
    k, v = jax.random.normal(jax.random.key(1), (2, 3, HEADS, DIM))
    for layer in range(len(kinds)):
        where = {
            "layer": layer,
            "page_table": jnp.int32([2]),
            "start": jnp.int32(0),
            "length": jnp.int32(3),
        }
        pages = write(pages, scales, k, v, **where)
    want = [
        read(pages, scales, layer=layer, page_table=jnp.int32([2])) for layer in range(len(kinds))
    ]
    pages = copy_pages(pages, jnp.int32([2]), jnp.int32([5]), jnp.int32(1))
    for layer, texts in enumerate(want):
        for there, copied in zip(
            texts, read(pages, scales, layer=layer, page_table=jnp.int32([5])), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(there)[:3], np.asarray(copied)[:3])
