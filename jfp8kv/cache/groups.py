"""Which layers share a page number, and how many pages a text needs of each kind of layer.

A layer that sees all of a text keeps all of its pages; a layer with a sliding window needs those of the window alone. So layers
are put into *groups* of at most `depth`, each with one kind of window: a page number that a group takes is a page in each of
its layers, and every group has a page table of its own. One pool and one allocator serve all groups, since a page is as large
whoever takes it: what windows save goes to whoever needs it. A model without windows is one group of all its layers.
A layer may be more than one slot wide: where formats differ, a 16-bit layer takes two (cache/layout.py).

A group with a window holds a *ring* of pages: logical page `j` lies in its `j % held`-th page, long enough that a page is
written again only when no query can see what it held. (vLLM calls the idea a hybrid KV cache.)
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

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
        kinds = {window: [i for i, w in enumerate(windows) if w == window] for window in dict.fromkeys(windows)}
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
class PageNeeds:
    """How many pages requests need of each group, when one dispatch adds at most `span` tokens to a text."""

    groups: LayerGroups
    page_size: int
    span: int

    def of(self, tokens: int) -> list[int]:
        """Pages of each group that a text of up to `tokens` tokens needs at any one time."""
        return [min(self._holding(tokens), self._ring(window)) for window in self.groups.windows]

    def total(self, tokens: int) -> int:
        """Pages of all groups together."""
        return sum(self.of(tokens))

    def entries(self, held: Sequence[Sequence[int]], start: int, stop: int) -> Iterator[tuple[int, slice, list[int]]]:
        """Page table entries for a dispatch on tokens `start .. stop-1`: of which group, where in its table, and the pages.

        Entries before a window and past `stop` are left out: nothing there is read.
        """
        last = self._holding(stop)
        for group, pages in enumerate(held):
            window = self.groups.windows[group]
            first = max(0, start - window + 1) // self.page_size if window else 0
            yield group, slice(first, last), [pages[j % len(pages)] for j in range(first, last)]

    def _holding(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _ring(self, window: int) -> int:
        """Pages that any `window - 1 + span` tokens in a row can touch: the span and what its first token sees."""
        if not window:
            return sys.maxsize
        return (window + self.span - 3) // self.page_size + 2
