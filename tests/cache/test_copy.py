"""Copying a page copies its bytes in every layer, for all specs, and changes nothing else."""

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
SPECS = {
    "e4m3": [LayerCacheSpec(E4M3)] * 3,
    "e5m2 with token-head scales": [LayerCacheSpec(E5M2, dynamic=True)] * 3,
    "bfloat16": [LayerCacheSpec(BFLOAT16)] * 3,
    "byte-split": [
        LayerCacheSpec(E4M3, dynamic=True),
        LayerCacheSpec(BFLOAT16),
        LayerCacheSpec(FLOAT32),
        LayerCacheSpec(E5M2),
    ],
}
each_spec = pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
each_layout = pytest.mark.parametrize(
    "keys_transposed", [True, False], ids=["keys transposed", "keys as values"]
)


def pool(specs: list[LayerCacheSpec], windows: list[int], keys_transposed: bool) -> KVPool:
    """Return a pool of random bits."""
    layout = PoolLayout.of(
        specs, LayerGroups.of(windows, slot_widths(specs)), keys_transposed=keys_transposed
    )
    pages = new_pool(layout, num_pages=PAGES, page_size=SIZE, kv_heads=HEADS, head_dim=DIM)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 256, x.shape).astype(x.dtype)), pages)


@each_spec
@each_layout
@pytest.mark.parametrize("windows", ["one group", "a group for each window"])
def test_copies_run_in_order_and_change_nothing_else(specs, keys_transposed, windows) -> None:
    pages = pool(
        specs, [0] * len(specs) if windows == "one group" else [*range(len(specs))], keys_transposed
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


@each_spec
def test_a_copied_page_reads_the_same(specs) -> None:
    pages = pool(specs, [0] * len(specs), True)
    scales = LayerScales.of(
        KVScales.unit(len(specs)), layers=len(specs), kv_heads=HEADS, head_dim=DIM
    )
    k, v = jax.random.normal(jax.random.key(1), (2, 3, HEADS, DIM))
    for layer in range(len(specs)):
        where = {
            "layer": layer,
            "page_table": jnp.int32([2]),
            "start": jnp.int32(0),
            "length": jnp.int32(3),
        }
        pages = write(pages, scales, k, v, **where)
    want = [
        read(pages, scales, layer=layer, page_table=jnp.int32([2])) for layer in range(len(specs))
    ]
    pages = copy_pages(pages, jnp.int32([2]), jnp.int32([5]), jnp.int32(1))
    for layer, expected in enumerate(want):
        for original, copied in zip(
            expected, read(pages, scales, layer=layer, page_table=jnp.int32([5])), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(original)[:3], np.asarray(copied)[:3])
