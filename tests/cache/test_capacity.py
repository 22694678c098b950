"""The memory budget of the cache, in pages."""

import jax
import pytest

from jfp8kv.cache import capacity
from jfp8kv.cache.capacity import default_bytes, free_bytes, pages_for
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.pool import new_pool, page_bytes
from jfp8kv.core.errors import CapacityError
from jfp8kv.core.formats import BFLOAT16, E4M3, E5M2, FLOAT32


def test_a_budget_pays_for_whole_pages_up_to_a_limit_and_at_least_one() -> None:
    assert pages_for(1050, bytes_per_page=100, page_size=16, limit=99) == 10
    assert pages_for(10**9, bytes_per_page=100, page_size=16, limit=99) == 99
    with pytest.raises(CapacityError, match="takes 100 bytes"):
        pages_for(99, bytes_per_page=100, page_size=16, limit=99)


SPECS = {
    "e4m3": [LayerCacheSpec(E4M3)] * 3,
    "dynamic": [LayerCacheSpec(E4M3, True)] * 3,
    "bf16": [LayerCacheSpec(BFLOAT16)] * 3,
} | {
    "mixed": [
        LayerCacheSpec(E4M3),
        LayerCacheSpec(BFLOAT16),
        LayerCacheSpec(E5M2, True),
        LayerCacheSpec(FLOAT32),
    ]
}


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_page_bytes_match_the_arrays_and_contain_no_padding(specs) -> None:
    layout, sizes = (
        PoolLayout.of(specs, LayerGroups.of([0] * len(specs), slot_widths(specs))),
        {"page_size": 8, "kv_heads": 2},
    )
    pool = new_pool(layout, num_pages=5, head_dim=16, **sizes)
    assert sum(x.nbytes for x in jax.tree.leaves(pool)) == 5 * page_bytes(
        layout, head_dim=16, **sizes
    )
    assert page_bytes(layout, head_dim=16, **sizes) == 2 * 8 * 2 * sum(
        16 * spec.fmt.itemsize + spec.dynamic for spec in specs
    )


def test_the_default_size_on_a_host_is_a_share_of_the_free_memory(monkeypatch) -> None:
    device = jax.devices()[0]
    assert 0 < default_bytes(device) < free_bytes(device)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 1000)
    assert default_bytes(device) == 64, "a tenth, rounded down to a power of two"
    assert default_bytes(device, step_bytes=960) == 32


def test_a_step_that_leaves_no_memory_is_refused() -> None:
    with pytest.raises(CapacityError, match="no memory is left for the KV cache.*max_num_seqs"):
        default_bytes(jax.devices()[0], step_bytes=1 << 60)
