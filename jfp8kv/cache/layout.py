"""What each layer keeps in the pool, and where: formats may differ from layer to layer.

All layers share page numbers, so a page number must mean as many bytes whoever takes it. Where all layers have one format, a
page has a *slot* for each layer of a group, of elements of that format. Where formats differ, slots are of bytes and a wider
element is cut into *planes*, its bytes from high to low: an FP8 layer takes one slot, a 16-bit layer two in a row,
a float32 layer four. Nothing is padded, and one pool and one allocator still serve all.

Dynamic scales take slots of their own, so that layers without them pay nothing.

A page has values as `[kv_heads, page_size, head_dim]`. Whether it has keys so too depends on who attends. A GPU kernel loads
and writes a token's channels side by side. For a CPU keys are transposed, `[kv_heads, head_dim, page_size]`: both products of
attention then run along rows, `q k^T` over tokens and `p v` over channels, twice as fast with AVX2 (docs/log.md). A key is
written with a stride, once; it is read once per token to come.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jfp8kv.cache.groups import LayerGroups
from jfp8kv.core.formats import KVFormat


@dataclasses.dataclass(frozen=True)
class LayerCacheSpec:
    """What a layer keeps: elements of `fmt`, with a scale for every token and head beside them if `dynamic`."""

    fmt: KVFormat
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.fmt.name} with token_head scales" if self.dynamic else self.fmt.name


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """Where a page number's layers lie: `depth` slots, of which layer `l` has those from `slots[l]` on.

    `exponent_slots` and `exponent_depth` are the same for the dynamic scales; a layer without has some slot it never uses.
    `keys_transposed`: a page's keys have channels before tokens.
    """

    kinds: tuple[LayerCacheSpec, ...]
    slots: tuple[int, ...]
    depth: int
    exponent_slots: tuple[int, ...] = ()
    exponent_depth: int = 0
    keys_transposed: bool = True

    @classmethod
    def of(
        cls, kinds: Sequence[LayerCacheSpec], groups: LayerGroups, *, keys_transposed: bool = True
    ) -> "PoolLayout":
        """The layout of layers of these kinds in `groups`, which were made for `widths(kinds)`."""
        used: Counter[int] = Counter()
        exponent_slots = []
        for group, kind in zip(groups.group, kinds, strict=True):
            exponent_slots.append(used[group] if kind.dynamic else 0)
            used[group] += kind.dynamic
        exponent_depth = max(used.values(), default=0)
        return cls(
            tuple(kinds),
            groups.slot,
            groups.depth,
            tuple(exponent_slots),
            exponent_depth,
            keys_transposed,
        )

    @classmethod
    def alike(
        cls, fmt: KVFormat, layers: int, *, dynamic: bool = False, keys_transposed: bool = True
    ) -> "PoolLayout":
        """Layers of one kind, in one group."""
        kinds = (LayerCacheSpec(fmt, dynamic),) * layers
        return cls.of(
            kinds, LayerGroups.of((0,) * layers, widths(kinds)), keys_transposed=keys_transposed
        )

    @property
    def distinct(self) -> tuple[LayerCacheSpec, ...]:
        """The kinds there are, in the order of their first layers."""
        return tuple(dict.fromkeys(self.kinds))

    @property
    def stored(self) -> np.dtype:
        """The type of the pool's arrays."""
        return stored_type(self.kinds)

    def planes(self, kind: LayerCacheSpec) -> int:
        """Slots that a layer of this kind takes."""
        return kind.fmt.stored.itemsize // self.stored.itemsize


def stored_type(kinds: Sequence[LayerCacheSpec]) -> np.dtype:
    """The elements of the one format there is, or bytes."""
    types = {kind.fmt.stored for kind in kinds}
    return types.pop() if len(types) == 1 else np.dtype(np.uint8)


def widths(kinds: Sequence[LayerCacheSpec]) -> tuple[int, ...]:
    """Slots that each layer takes."""
    stored = stored_type(kinds)
    return tuple(kind.fmt.stored.itemsize // stored.itemsize for kind in kinds)
