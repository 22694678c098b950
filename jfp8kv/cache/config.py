"""From what a user says of the KV cache to a format, scales and a pool of pages."""

import dataclasses
import functools
import warnings
from collections import Counter
from typing import Any

import jax
import numpy as np

from jfp8kv.cache.capacity import default_bytes, pages_for
from jfp8kv.cache.default_scales import without_scales
from jfp8kv.cache.groups import LayerGroups, PageRequirements
from jfp8kv.cache.kv_dtype import layer_formats, plan_of
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, widths
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool, page_bytes
from jfp8kv.cache.scales import SCALE_NAMES, TOKEN_HEAD, UNIT, KVScales, check_shape
from jfp8kv.core.errors import ConfigError, invalid_choice
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.sizes import parse_bytes
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What each layer of a cache keeps, and its scales; `scales` is None when all are dynamic (one per token and head, in the
    pages).

    `span` is the most tokens that one dispatch adds to a text: pages of a window last so much longer. `keys_transposed` is how
    the attention in use wants keys in their pages (cache/layout.py); a CPU's does.
    """

    kinds: tuple[LayerCacheSpec, ...]
    scales: KVScales | None
    config: ModelConfig
    page_size: int
    max_tokens_per_dispatch: int
    keys_transposed: bool = True

    @property
    def name(self) -> str:
        """The format's name; where layers differ, each with how many layers have it: "fp8_e4m3 x28, bfloat16 x2"."""
        counts = Counter(kind.fmt.name for kind in self.kinds)
        return (
            next(iter(counts))
            if len(counts) == 1
            else ", ".join(f"{name} x{n}" for name, n in counts.most_common())
        )

    @property
    def dynamic(self) -> bool:
        """Whether any layer has dynamic scales."""
        return any(kind.dynamic for kind in self.kinds)

    @functools.cached_property
    def groups(self) -> LayerGroups:
        """Which layers share a page number."""
        return LayerGroups.of(self.config.windows or (0,) * self.config.layers, widths(self.kinds))

    @functools.cached_property
    def layout(self) -> PoolLayout:
        """Where each layer lies in the pool."""
        return PoolLayout.of(self.kinds, self.groups, keys_transposed=self.keys_transposed)

    @property
    def _page(self) -> dict[str, Any]:
        return {
            "page_size": self.page_size,
            "kv_heads": self.config.kv_heads,
            "head_dim": self.config.head_dim,
        }

    @property
    def page_bytes(self) -> int:
        """Bytes of one page number over the layers that share it."""
        return page_bytes(self.layout, **self._page)

    @property
    def requirements(self) -> PageRequirements:
        """How many pages a text takes."""
        return PageRequirements(self.groups, self.page_size, self.max_tokens_per_dispatch)

    @property
    def without_windows(self) -> "CacheConfig":
        """The same cache if every layer kept the whole text."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, windows=()))

    def text_bytes(self, tokens: int) -> int:
        """Bytes of the pages that a text of `tokens` tokens takes in all layers."""
        return self.requirements.total_pages(tokens) * self.page_bytes

    def bytes_per_token(self, tokens: int) -> float:
        """`text_bytes` of a text that fills its last page, by token: without windows the same for every length."""
        return self.text_bytes(tokens) / (-(-tokens // self.page_size) * self.page_size)

    def num_pages(self, memory: int | str | None, *, most: int) -> int:
        """Pages that `memory` bytes hold (None: a share of what is free on the device), at most `most`."""
        budget = default_bytes(jax.local_devices()[0]) if memory is None else parse_bytes(memory)
        return pages_for(
            budget, bytes_per_page=self.page_bytes, page_size=self.page_size, most=most
        )

    def pool(self, num_pages: int) -> KVPool:
        """A new pool on the device."""
        return new_pool(self.layout, num_pages=num_pages, **self._page)

    def layer_scales(self) -> LayerScales | None:
        """The static scales on the device."""
        c = self.config
        sizes = {"layers": c.layers, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        return None if self.scales is None else LayerScales.of(self.scales, **sizes)


def resolve_cache(
    params: Params,
    kv_dtype: Any,
    kv_scales: Any,
    *,
    page_size: int,
    max_tokens_per_dispatch: int,
    longest: int | None = None,
) -> CacheConfig:
    """Resolve `kv_dtype` and `kv_scales` for this model. Raises `ConfigError` or `CheckpointError` for what cannot be.

    `longest` is the most tokens of a text, None what the model was trained for. The leaves of `params` may be shapes alone,
    which do not say whether a model needs more than scale 1.
    """
    config = params.config
    plan = plan_of(kv_dtype)
    if plan is not None:
        kinds, scales = _planned(plan, config, kv_scales)
    else:
        formats = layer_formats(kv_dtype, config, params.dtype.name)
        if isinstance(kv_scales, str) and kv_scales == "auto" and params.kv_scales is None:
            dynamic, (formats, scales) = (
                False,
                without_scales(params, formats, longest or config.max_len),
            )
        else:
            dynamic, scales = _scales(params, formats, kv_scales)
        kinds = tuple(LayerCacheSpec(fmt, dynamic and fmt.is_fp8) for fmt in formats)
    if scales is None and not all(kind.dynamic for kind in kinds):
        scales = KVScales.unit(config.layers)
    return CacheConfig(kinds, scales, config, page_size, max_tokens_per_dispatch)


def _planned(
    plan: KVPlan, config: ModelConfig, kv_scales: Any
) -> tuple[tuple[LayerCacheSpec, ...], KVScales]:
    """What a plan says. Its scales are part of it: others are refused."""
    if not (isinstance(kv_scales, str) and kv_scales == "auto"):
        raise ConfigError(
            f"kv_scales={kv_scales!r}: kv_dtype is a plan, which brings its own scales; leave kv_scales out."
        )
    plan.check(config.layers)
    check_shape(
        plan.scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim
    )
    return tuple(layer.kind for layer in plan.layers), plan.scales


def _scales(
    params: Params, formats: tuple[KVFormat, ...], given: Any
) -> tuple[bool, KVScales | None]:
    """Whether FP8 layers have dynamic scales, and the static ones."""
    config, quantized = params.config, [fmt for fmt in formats if fmt.is_fp8]
    if isinstance(given, str) and given not in SCALE_NAMES and not looks_like_path(given):
        raise invalid_choice("kv_scales", given, (*SCALE_NAMES, "a KVScales", "a path to one"))
    if isinstance(given, str) and (given == UNIT or (given == "auto" and not quantized)):
        return False, KVScales.unit(config.layers)
    if not quantized:
        raise ConfigError(
            f"kv_scales={given!r}: scales belong to an FP8 cache, and this one is {formats[0].name}; leave them out."
        )
    if isinstance(given, str) and given == TOKEN_HEAD:
        return True, None
    if isinstance(given, str) and given in ("auto", "checkpoint"):
        if params.kv_scales is None:
            raise ConfigError(
                "kv_scales='checkpoint': the checkpoint has none; try 'unit', 'token_head' or a KVScales."
            )
        given = params.kv_scales
    if looks_like_path(given):
        given = KVScales.load(given)
    if not isinstance(given, KVScales):
        raise invalid_choice("kv_scales", given, (*SCALE_NAMES, "a KVScales", "a path to one"))
    check_shape(given, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim)
    return False, _for_formats(given, formats)


def _for_formats(scales: KVScales, formats: tuple[KVFormat, ...]) -> KVScales:
    """Scales for the formats that the layers have: 1 where a layer is not FP8, and where they were made for another format,
    changed so that the largest value stays the largest, said aloud."""
    made_for = scales.kv_dtype and kv_format(scales.kv_dtype)
    for fmt in dict.fromkeys(fmt for fmt in formats if fmt.is_fp8 and made_for not in (None, fmt)):
        warnings.warn(
            f"The KV scales are made for {made_for.name}: for {fmt.name} they are multiplied by the ratio of the formats' "
            f"largest values, {made_for.largest:g} / {fmt.largest:g}.",
            stacklevel=2,
        )
    if all(fmt is made_for or (made_for is None and fmt.is_fp8) for fmt in formats):
        return scales

    def fitted(name: str) -> np.ndarray:
        value = getattr(scales, name).copy()
        for layer, fmt in enumerate(formats):
            if not fmt.is_fp8:
                value[layer] = 1
            elif made_for is not None:
                value[layer] *= np.float32(made_for.largest / fmt.largest)
        return value

    return KVScales(fitted("k"), fitted("v"), scales.k_offset)


def context_length(config: ModelConfig, max_model_len: Any) -> int:
    """Most tokens of a request; None is what the model was trained for. Raises `ConfigError` for more than that."""
    length = positive("max_model_len", max_model_len) or config.max_len
    if length > config.max_len:
        raise ConfigError(
            f"max_model_len={max_model_len}: this model was trained for at most {config.max_len} tokens."
        )
    return length


def positive(name: str, value: Any) -> int | None:
    """A positive integer or None; `ConfigError` with the name otherwise."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name}={value!r}: must be a positive integer.")
    return value
