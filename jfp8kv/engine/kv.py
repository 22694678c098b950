"""From what a user says of the KV cache to a format, scales and a pool of pages."""

import dataclasses
import os
import warnings
from typing import Any

import jax
import numpy as np

from jfp8kv.cache.capacity import default_bytes, pages_for, parse_bytes
from jfp8kv.cache.groups import LayerGroups, PageNeeds
from jfp8kv.cache.pages import KVPages, LayerScales, new_pages, page_bytes
from jfp8kv.cache.scales import NAMED, TOKEN_HEAD, UNIT, KVScales, check_shape
from jfp8kv.core.errors import ConfigError, one_of
from jfp8kv.core.formats import E4M3, KVFormat, kv_format
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params


@dataclasses.dataclass(frozen=True)
class KVSetup:
    """A cache's format and scales; `scales` is None when they are dynamic (one per token and head, in the pages).

    `span` is the most tokens that one dispatch adds to a text: pages of a window last so much longer.
    """

    fmt: KVFormat
    scales: KVScales | None
    config: ModelConfig
    page_size: int
    span: int

    @property
    def groups(self) -> LayerGroups:
        """Which layers share a page number."""
        return LayerGroups.of(self.config.windows or (0,) * self.config.layers)

    @property
    def _page(self) -> dict[str, Any]:
        return {
            "page_size": self.page_size,
            "kv_heads": self.config.kv_heads,
            "head_dim": self.config.head_dim,
            "dynamic": self.scales is None,
        }

    @property
    def page_bytes(self) -> int:
        """Bytes of one page number over the layers that share it."""
        return page_bytes(self.fmt, depth=self.groups.depth, **self._page)

    @property
    def needs(self) -> PageNeeds:
        """How many pages a text takes."""
        return PageNeeds(self.groups, self.page_size, self.span)

    @property
    def without_windows(self) -> "KVSetup":
        """The same cache if every layer kept the whole text."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, windows=()))

    def text_bytes(self, tokens: int) -> int:
        """Bytes of the pages that a text of `tokens` tokens takes in all layers."""
        return self.needs.total(tokens) * self.page_bytes

    def bytes_per_token(self, tokens: int) -> float:
        """`text_bytes` of a text that fills its last page, by token: without windows the same for every length."""
        return self.text_bytes(tokens) / (-(-tokens // self.page_size) * self.page_size)

    def num_pages(self, memory: Any, *, most: int) -> int:
        """Pages that `memory` bytes hold (None: a share of what is free on the device), at most `most`."""
        budget = default_bytes(jax.local_devices()[0]) if memory is None else parse_bytes(memory)
        return pages_for(budget, bytes_per_page=self.page_bytes, page_size=self.page_size, most=most)

    def pool(self, num_pages: int) -> KVPages:
        """A new pool on the device."""
        groups = self.groups
        slots = () if groups.uniform else groups.slot
        return new_pages(self.fmt, depth=groups.depth, slots=slots, num_pages=num_pages, **self._page)

    def layer_scales(self) -> LayerScales | None:
        """The static scales on the device."""
        c = self.config
        sizes = {"layers": c.layers, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        return None if self.scales is None else LayerScales.of(self.scales, **sizes)


def setup(params: Params, kv_dtype: Any, kv_scales: Any, *, page_size: Any, span: int) -> KVSetup:
    """Resolve `kv_dtype` and `kv_scales` for this model. Raises `ConfigError` or `CheckpointError` for what cannot be.

    Of the weights only their type is looked at.
    """
    config = params.config
    if kv_dtype == "auto":
        kv_dtype = config.kv_cache_dtype or params.dtype.name
    fmt = kv_format(kv_dtype)
    if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
        raise ConfigError(f"page_size={page_size!r}: must be a positive number of tokens; try 64.")
    return KVSetup(fmt, _scales(params, fmt, kv_scales), config, page_size, span)


def _for_format(scales: KVScales, fmt: KVFormat) -> KVScales:
    """A checkpoint's scales, which are for E4M3, made for `fmt`: the largest value stays the largest, said aloud."""
    if fmt is E4M3:
        return scales
    warnings.warn(
        f"The checkpoint's KV scales are made for {E4M3.name}: for {fmt.name} they are multiplied by the ratio of the formats' "
        f"largest values, {E4M3.largest:g} / {fmt.largest:g}.",
        stacklevel=2,
    )
    ratio = np.float32(E4M3.largest / fmt.largest)
    return KVScales(scales.k * ratio, scales.v * ratio)


def _scales(params: Params, fmt: KVFormat, given: Any) -> KVScales | None:
    config = params.config
    if isinstance(given, str) and given not in NAMED and os.path.sep not in given and not os.path.exists(given):
        raise one_of("kv_scales", given, (*NAMED, "a KVScales", "a path to one"))
    if isinstance(given, str) and (given == UNIT or (given == "auto" and (params.kv_scales is None or not fmt.is_fp8))):
        return KVScales.unit(config.layers)
    if not fmt.is_fp8:
        raise ConfigError(f"kv_scales={given!r}: scales belong to an FP8 cache, and this one is {fmt.name}; leave them out.")
    if isinstance(given, str) and given == TOKEN_HEAD:
        return None
    if isinstance(given, str) and given in ("auto", "checkpoint"):
        if params.kv_scales is None:
            raise ConfigError("kv_scales='checkpoint': the checkpoint has none; try 'unit', 'token_head' or a KVScales.")
        given = _for_format(params.kv_scales, fmt)
    if isinstance(given, str | os.PathLike):
        given = KVScales.load(given)
    if not isinstance(given, KVScales):
        raise one_of("kv_scales", given, (*NAMED, "a KVScales", "a path to one"))
    check_shape(given, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim)
    return given


def context_length(config: ModelConfig, max_model_len: Any) -> int:
    """Most tokens of a request; None is what the model was trained for. Raises `ConfigError` for more than that."""
    length = positive("max_model_len", max_model_len, config.max_len)
    if length > config.max_len:
        raise ConfigError(f"max_model_len={max_model_len}: this model was trained for at most {config.max_len} tokens.")
    return length


def positive(name: str, value: Any, default: int) -> int:
    """A positive integer, `default` for None; `ConfigError` with the name otherwise."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a positive integer.")
    return value
