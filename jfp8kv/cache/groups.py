"""Which layers share a page number, and how many pages a text needs of each kind of layer.

A layer that sees all of a text keeps all of its pages; a layer with a sliding window needs those of the window alone. So layers
are put into *groups* of at most `depth`, each with one kind of window: a page number that a group takes is a page in each of
its layers, and every group has a page table of its own. One pool and one allocator serve all groups, since a page is as large
whoever takes it: what windows save goes to whoever needs it. A model without windows is one group of all its layers.
A layer may be more than one slot wide: where formats differ, a 16-bit layer takes two (cache/layout.py).

A group with a window lets go of pages that no query to come can see, and takes new ones as the text grows: what a page holds
never changes once it is full, so pages of windows can be shared like all others. (vLLM calls groups a hybrid KV cache.)
"""

import dataclasses
import sys
from collections.abc import Sequence

WASTE = 0.1  # share of the slots of one kind of layer that may lie idle for the sake of fewer, deeper groups


@dataclasses.dataclass(frozen=True)
class LayerGroups:
    """`group` and `slot` by layer: which page table it reads, and its first place among the `depth` slots of a page. `windows`
    by group, in tokens, 0 for all."""

    group: tuple[int, ...]
    slot: tuple[int, ...]
    windows: tuple[int, ...]
    depth: int

    @property
    def uniform(self) -> bool:
        """Whether one page table serves all layers, each its own slot."""
        return len(self.windows) == 1

    @classmethod
    def of(cls, windows: Sequence[int], widths: Sequence[int] | None = None) -> "LayerGroups":
        """The groups of layers with these windows, each so many slots wide (1): as deep as can be with little lying idle."""
        widths = widths or [1] * len(windows)
        kinds = {
            window: [i for i, w in enumerate(windows) if w == window]
            for window in dict.fromkeys(windows)
        }
        sizes = [[widths[layer] for layer in layers] for layers in kinds.values()]
        least = max(widths)
        depths = [d for d in range(max(map(sum, sizes)), least - 1, -1)]
        depth = next((d for d in depths if max(_idle(each, d) for each in sizes) <= WASTE), None)
        if depth is None:  # wide and narrow layers that fill no depth well
            depth = min(depths, key=lambda d: sum(d * len(_packed(each, d)) for each in sizes))
        group, slot, by_group = [0] * len(windows), [0] * len(windows), []
        for window, layers in kinds.items():
            for members in _packed([widths[layer] for layer in layers], depth):
                place = 0
                for index in members:
                    group[layers[index]], slot[layers[index]] = len(by_group), place
                    place += widths[layers[index]]
                by_group.append(window)
        return cls(tuple(group), tuple(slot), tuple(by_group), depth)


def _packed(widths: Sequence[int], depth: int) -> list[list[int]]:
    """Indices of layers by group: each goes into the first group that has room."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index, width in enumerate(widths):
        at = next((g for g, left in enumerate(room) if left >= width), None)
        if at is None:
            at = len(groups)
            groups.append([])
            room.append(depth)
        groups[at].append(index)
        room[at] -= width
    return groups


def _idle(widths: Sequence[int], depth: int) -> float:
    """The share of slots that layers of one window leave empty."""
    return 1 - sum(widths) / (len(_packed(widths, depth)) * depth)


@dataclasses.dataclass(frozen=True)
class PageRequirements:
    """How many pages requests need of each group, when one dispatch adds at most `span` tokens to a text."""

    groups: LayerGroups
    page_size: int
    max_tokens_per_dispatch: int

    def of(self, tokens: int) -> list[int]:
        """Pages of each group that a text of up to `tokens` tokens needs at any one time."""
        return [self.pages_between(group, 0, tokens) for group in range(len(self.groups.windows))]

    def total_pages(self, tokens: int) -> int:
        """Pages of all groups together."""
        return sum(self.of(tokens))

    def first_page(self, group: int, start: int) -> int:
        """The first page of a text that queries from position `start` on see in this group."""
        window = self.groups.windows[group]
        return max(0, start - window + 1) // self.page_size if window else 0

    def end_page(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def pages_between(self, group: int, start: int, stop: int) -> int:
        """Pages of this group that are held at the most, on the way from queries at `start` to tokens up to `stop`."""
        return min(
            self.end_page(stop) - self.first_page(group, start),
            self._most(self.groups.windows[group]),
        )

    def _most(self, window: int) -> int:
        """Pages that any `window - 1 + span` tokens in a row can touch: the span and what its first token sees."""
        if not window:
            return sys.maxsize
        return (window + self.max_tokens_per_dispatch - 3) // self.page_size + 2
