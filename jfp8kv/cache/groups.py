"""Layer groups: layers that share page numbers, and how many pages a sequence needs of each group.

A layer with full attention needs all pages of a sequence. A layer with a sliding window needs the
pages of the window only. So layers form *groups*, each with one kind of window. A page number that
a group allocates is a page in each of its layers, and every group has one page table per sequence.
One pool and one allocator serve all groups, since a page number has the same bytes in every group:
memory that windows save is available to all sequences. A model without windows is one group of all
layers. (vLLM: hybrid KV cache manager.)

The pages of one page number take `depth` *layer slots*. A layer takes one slot, or several where
formats differ: a 16-bit layer takes two slots of bytes (cache/layout.py).

A group with a window frees pages that no later query can see, and allocates new ones as the
sequence grows. The contents of a full page never change, so pages of windowed layers can be shared
like all others.
"""

import dataclasses
import sys
from collections.abc import Sequence

MAX_IDLE = 0.1  # the largest accepted share of unused layer slots, for fewer and deeper groups


@dataclasses.dataclass(frozen=True)
class LayerGroups:
    """Assignment of layers to groups and layer slots.

    Attributes:
      group: by layer, the group whose page table the layer uses.
      slot: by layer, its first layer slot.
      windows: by group, the window in tokens; 0 for full attention.
      depth: layer slots per page number.
    """

    group: tuple[int, ...]
    slot: tuple[int, ...]
    windows: tuple[int, ...]
    depth: int

    @property
    def uniform(self) -> bool:
        """Whether one page table serves all layers."""
        return len(self.windows) == 1

    @classmethod
    def of(cls, windows: Sequence[int], widths: Sequence[int] | None = None) -> "LayerGroups":
        """Group layers by window, as deep as possible with few unused layer slots.

        Args:
          windows: by layer, in tokens; 0 for full attention.
          widths: by layer, the number of layer slots it takes; 1 each if None.
        """
        widths = widths or [1] * len(windows)
        layers_by_window = {
            window: [i for i, w in enumerate(windows) if w == window]
            for window in dict.fromkeys(windows)
        }
        sizes = [[widths[layer] for layer in layers] for layers in layers_by_window.values()]
        depths = range(max(map(sum, sizes)), max(widths) - 1, -1)
        fitting = (d for d in depths if max(_idle(each, d) for each in sizes) <= MAX_IDLE)
        depth = next(fitting, None)
        if depth is None:  # wide and narrow layers leave slots unused at every depth
            depth = min(depths, key=lambda d: sum(d * len(_pack(each, d)) for each in sizes))
        group_of = [0] * len(windows)
        slot_of = [0] * len(windows)
        window_of_group: list[int] = []
        for window, layers in layers_by_window.items():
            for members in _pack([widths[layer] for layer in layers], depth):
                slot = 0
                for index in members:
                    layer = layers[index]
                    group_of[layer] = len(window_of_group)
                    slot_of[layer] = slot
                    slot += widths[layer]
                window_of_group.append(window)
        return cls(tuple(group_of), tuple(slot_of), tuple(window_of_group), depth)


def _pack(widths: Sequence[int], depth: int) -> list[list[int]]:
    """Pack layers into groups of `depth` slots, first fit; return their indices by group."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index, width in enumerate(widths):
        group = next((g for g, left in enumerate(room) if left >= width), None)
        if group is None:
            group = len(groups)
            groups.append([])
            room.append(depth)
        groups[group].append(index)
        room[group] -= width
    return groups


def _idle(widths: Sequence[int], depth: int) -> float:
    """Return the share of layer slots that the layers of one window leave unused."""
    return 1 - sum(widths) / (len(_pack(widths, depth)) * depth)


@dataclasses.dataclass(frozen=True)
class PageRequirements:
    """The number of pages that sequences need, by group.

    Attributes:
      groups: the layer groups.
      page_size: tokens per page.
      max_tokens_per_dispatch: the most tokens that one dispatch adds to a sequence.
    """

    groups: LayerGroups
    page_size: int
    max_tokens_per_dispatch: int

    def of(self, tokens: int) -> list[int]:
        """Return, by group, the most pages that a sequence of up to `tokens` tokens ever needs."""
        return [self.pages_between(group, 0, tokens) for group in range(len(self.groups.windows))]

    def total_pages(self, tokens: int) -> int:
        """Return the pages of all groups together."""
        return sum(self.of(tokens))

    def first_page(self, group: int, start: int) -> int:
        """Return the first page that queries from position `start` on see in this group."""
        window = self.groups.windows[group]
        return max(0, start - window + 1) // self.page_size if window else 0

    def end_page(self, tokens: int) -> int:
        """Return the number of pages of `tokens` tokens."""
        return -(-tokens // self.page_size)

    def pages_between(self, group: int, start: int, stop: int) -> int:
        """Return the most pages of a group that steps on positions `start .. stop - 1` use."""
        return min(
            self.end_page(stop) - self.first_page(group, start),
            self._most_pages(self.groups.windows[group]),
        )

    def _most_pages(self, window: int) -> int:
        """Return the most pages that the tokens of a dispatch and their windows touch."""
        if not window:
            return sys.maxsize
        return (window + self.max_tokens_per_dispatch - 3) // self.page_size + 2
