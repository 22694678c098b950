"""Layer groups: separate layer slots, few of them unused; a window bounds the pages needed."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jfp8kv.cache.groups import MAX_IDLE, LayerGroups, PageRequirements

layer_windows = st.lists(st.sampled_from([0, 0, 8, 16]), min_size=1, max_size=48)


@given(windows=layer_windows)
def test_layers_have_separate_slots_and_few_slots_are_unused(windows) -> None:
    groups = LayerGroups.of(windows)
    places = list(zip(groups.group, groups.slot, strict=True))
    assert len(set(places)) == len(windows)
    assert all(slot < groups.depth for slot in groups.slot)
    assert [groups.windows[group] for group in groups.group] == windows
    assert len(windows) >= (1 - MAX_IDLE) * len(groups.windows) * groups.depth - 1e-9


@given(
    layers=st.lists(
        st.tuples(st.sampled_from([0, 0, 8]), st.sampled_from([1, 2, 4])), min_size=1, max_size=40
    )
)
def test_layers_of_several_widths_never_share_a_slot(layers) -> None:
    windows, widths = zip(*layers, strict=True)
    groups = LayerGroups.of(windows, widths)
    taken = [
        (g, s + i)
        for g, s, w in zip(groups.group, groups.slot, widths, strict=True)
        for i in range(w)
    ]
    assert len(set(taken)) == sum(widths) and all(slot < groups.depth for _, slot in taken)
    assert [groups.windows[group] for group in groups.group] == list(windows)
    if len(set(windows)) == 1:
        assert groups.uniform and groups.depth == sum(widths), "no slot is unused"


def test_layers_without_windows_are_one_group_with_a_slot_each() -> None:
    groups = LayerGroups.of([0] * 5)
    assert groups.uniform and groups.slot == (0, 1, 2, 3, 4) and groups.depth == 5


@pytest.mark.parametrize(
    ("windows", "depth", "count"),
    [
        ([8, 0] * 13, 13, 2),
        (([8] * 5 + [0]) * 4, 4, 6),
        ([0] * 3 + [8], 1, 4),
        (([8] * 5 + [0]) * 4 + [8, 8], 4, 7),
    ],
)
def test_groups_are_as_deep_as_the_limit_on_unused_slots_allows(windows, depth, count) -> None:
    groups = LayerGroups.of(windows)
    assert (groups.depth, len(groups.windows)) == (depth, count)


def test_a_window_bounds_the_pages_of_long_sequences_only() -> None:
    requirements = PageRequirements(
        LayerGroups.of([512] * 5 + [0]), 64, max_tokens_per_dispatch=512
    )
    assert requirements.of(100) == [2] * 6
    assert requirements.of(8192) == [17] * 5 + [128]
    assert requirements.total_pages(8192) == 5 * 17 + 128
