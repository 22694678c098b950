"""Layout of the page pool: the format of each layer, and the rows of the pool that it uses.

All layers share page numbers, so a page number has the same bytes in every layer group. Where all
layers have one format, a page number has one *layer slot* per layer of a group, with elements of
that format. Where formats differ, layer slots are made of bytes and elements are *byte-split*: an
FP8 layer takes one slot, a 16-bit layer two consecutive ones (high bytes, low bytes), a float32
layer four. Nothing is padded, and one pool and one allocator still serve all layers.

Dynamic scales have separate slots, so layers without them use no memory for scales.

A page stores values as `[kv_heads, page_size, head_dim]`. Keys have the same axes, or are
transposed, depending on the attention backend. A GPU kernel loads and writes the contiguous
channels of a token. A CPU stores keys as `[kv_heads, head_dim, page_size]`: both matmuls of
attention then run along rows, `q k^T` over tokens and `p v` over channels, twice as fast with AVX2
(docs/log.md). A key is written with a stride once, and read once per later token.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jfp8kv.cache.groups import LayerGroups
from jfp8kv.core.formats import KVFormat


@dataclasses.dataclass(frozen=True)
class LayerCacheSpec:
    """What one layer stores: elements of `fmt`, and token-head scales next to them if `dynamic`."""

    fmt: KVFormat
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.fmt.name} with token_head scales" if self.dynamic else self.fmt.name


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """Where the pool stores the pages of each layer, and in which format.

    Attributes:
      specs: by layer, what it stores.
      slots: by layer, its first layer slot.
      depth: layer slots per page number.
      exponent_slots: by layer, its slot in the dynamic scales; 0 for layers with static scales.
      exponent_depth: slots per page number in the dynamic scales.
      keys_transposed: whether the keys of a page have channels before tokens.
    """

    specs: tuple[LayerCacheSpec, ...]
    slots: tuple[int, ...]
    depth: int
    exponent_slots: tuple[int, ...] = ()
    exponent_depth: int = 0
    keys_transposed: bool = True

    @classmethod
    def of(
        cls, specs: Sequence[LayerCacheSpec], groups: LayerGroups, *, keys_transposed: bool = True
    ) -> "PoolLayout":
        """Return the layout of layers with these specs, grouped by `slot_widths(specs)`."""
        used: Counter[int] = Counter()
        exponent_slots = []
        for group, spec in zip(groups.group, specs, strict=True):
            exponent_slots.append(used[group] if spec.dynamic else 0)
            used[group] += spec.dynamic
        return cls(
            specs=tuple(specs),
            slots=groups.slot,
            depth=groups.depth,
            exponent_slots=tuple(exponent_slots),
            exponent_depth=max(used.values(), default=0),
            keys_transposed=keys_transposed,
        )

    @classmethod
    def uniform(
        cls, fmt: KVFormat, layers: int, *, dynamic: bool = False, keys_transposed: bool = True
    ) -> "PoolLayout":
        """Return the layout of layers with the same spec, in one group."""
        specs = (LayerCacheSpec(fmt, dynamic),) * layers
        groups = LayerGroups.of((0,) * layers, slot_widths(specs))
        return cls.of(specs, groups, keys_transposed=keys_transposed)

    @property
    def distinct(self) -> tuple[LayerCacheSpec, ...]:
        """The distinct specs, in the order of their first layers."""
        return tuple(dict.fromkeys(self.specs))

    @property
    def storage_dtype(self) -> np.dtype:
        """The type of the arrays of the pool."""
        return storage_dtype(self.specs)

    def slot_width(self, spec: LayerCacheSpec) -> int:
        """Return the number of layer slots that a layer of this spec takes."""
        return spec.fmt.storage_dtype.itemsize // self.storage_dtype.itemsize


def storage_dtype(specs: Sequence[LayerCacheSpec]) -> np.dtype:
    """Return the storage type of a pool: that of the only format, or bytes if formats differ."""
    dtypes = {spec.fmt.storage_dtype for spec in specs}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.uint8)


def slot_widths(specs: Sequence[LayerCacheSpec]) -> tuple[int, ...]:
    """Return, by layer, the number of layer slots it takes."""
    itemsize = storage_dtype(specs).itemsize
    return tuple(spec.fmt.storage_dtype.itemsize // itemsize for spec in specs)
