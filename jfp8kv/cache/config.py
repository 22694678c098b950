"""The KV cache of a model: `kv_dtype` and `kv_scales` resolved to formats, scales and a pool."""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jfp8kv.cache.capacity import default_bytes, free_bytes, pages_for
from jfp8kv.cache.default_scales import default_scales
from jfp8kv.cache.groups import LayerGroups, PageRequirements
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool, page_bytes
from jfp8kv.cache.scales import TOKEN_HEAD, UNIT, KVScales, check_shape
from jfp8kv.core.errors import (
    ConfigError,
    DeviceMemoryError,
    did_you_mean,
    first_line,
    invalid_choice,
    is_out_of_memory,
)
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.sizes import parse_bytes
from jfp8kv.core.types import KV_DTYPES, KV_SCALES
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params

LAYER_TYPES = ("sliding_window", "full_attention")
_MAPPING_KEYS = ("default", "skip", "skip_dtype")
_KV_DTYPE_FORMS = (
    "a name for all layers, {'default': name, 'skip': [0, 'sliding_window']}, a list of one name "
    "per layer, a KVPlan or a path to one"
)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The KV cache of one model.

    Attributes:
      specs: by layer, what it stores.
      scales: static scales; None if every layer has dynamic ones.
      config: of the model.
      page_size: tokens per page.
      max_tokens_per_dispatch: the most tokens that one dispatch adds to a sequence; layers
        with a window need pages for them in addition to the window.
      keys_transposed: layout of keys that the attention backend needs (cache/layout.py).
    """

    specs: tuple[LayerCacheSpec, ...]
    scales: KVScales | None
    config: ModelConfig
    page_size: int
    max_tokens_per_dispatch: int
    keys_transposed: bool = True

    @property
    def name(self) -> str:
        """Name of the format, or the names with layer counts: "fp8_e4m3 x28, bfloat16 x2"."""
        counts = Counter(spec.fmt.name for spec in self.specs)
        if len(counts) == 1:
            return self.specs[0].fmt.name
        return ", ".join(f"{name} x{count}" for name, count in counts.most_common())

    @property
    def dynamic(self) -> bool:
        """Whether any layer has dynamic scales."""
        return any(spec.dynamic for spec in self.specs)

    @functools.cached_property
    def groups(self) -> LayerGroups:
        """The groups of layers that share page numbers (cache/groups.py)."""
        windows = self.config.windows or (0,) * self.config.layers
        return LayerGroups.of(windows, slot_widths(self.specs))

    @functools.cached_property
    def layout(self) -> PoolLayout:
        """The layout of the pool (cache/layout.py)."""
        return PoolLayout.of(self.specs, self.groups, keys_transposed=self.keys_transposed)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page number: of its pages in all layers of a group."""
        return page_bytes(
            self.layout,
            page_size=self.page_size,
            kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
        )

    @property
    def requirements(self) -> PageRequirements:
        """The number of pages that sequences need."""
        return PageRequirements(self.groups, self.page_size, self.max_tokens_per_dispatch)

    @property
    def without_windows(self) -> "CacheConfig":
        """The cache of the same model with full attention in every layer."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, windows=()))

    def sequence_bytes(self, tokens: int) -> int:
        """Return the bytes of the pages of a sequence of `tokens` tokens, in all layers."""
        return self.requirements.total_pages(tokens) * self.page_bytes

    def bytes_per_token(self, tokens: int) -> float:
        """Return the bytes per token of a sequence of `tokens` tokens, rounded up to whole pages.

        Without windows the result is the same for every length.
        """
        whole_pages = -(-tokens // self.page_size) * self.page_size
        return self.sequence_bytes(tokens) / whole_pages

    def num_pages(self, memory: int | str | None, *, limit: int) -> int:
        """Return the number of pages in `memory` bytes, at most `limit`.

        If `memory` is None, the budget is a share of the free memory of the device.
        """
        budget = default_bytes(jax.local_devices()[0]) if memory is None else parse_bytes(memory)
        return pages_for(
            budget, bytes_per_page=self.page_bytes, page_size=self.page_size, limit=limit
        )

    def new_pool(self, num_pages: int) -> KVPool:
        """Allocate a pool on the device."""
        return new_pool(
            self.layout,
            num_pages=num_pages,
            page_size=self.page_size,
            kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
        )

    def allocate(self, num_pages: int) -> KVPool:
        """Allocate a pool and wait for it. Raises `DeviceMemoryError` if it does not fit."""
        try:
            return jax.block_until_ready(self.new_pool(num_pages))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"a KV cache of {num_pages * self.page_bytes} bytes does not fit on the device, "
                f"which has about {free_bytes(jax.local_devices()[0])} bytes free: "
                f"{first_line(error)} Try a smaller kv_cache_memory."
            ) from error

    def layer_scales(self) -> LayerScales | None:
        """Return the static scales on the device; None if every layer has dynamic ones."""
        if self.scales is None:
            return None
        return LayerScales.of(
            self.scales,
            layers=self.config.layers,
            kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
        )


def resolve_cache(
    params: Params,
    kv_dtype: object,
    kv_scales: object,
    *,
    page_size: int,
    max_tokens_per_dispatch: int,
    max_model_len: int | None = None,
) -> CacheConfig:
    """Resolve `kv_dtype` and `kv_scales` for a model.

    Args:
      params: the model. Its leaves may be shapes, which do not show a K bias.
      kv_dtype: a name, formats by layer (see `layer_formats`), a `KVPlan` or a path to one.
      kv_scales: a name, a `KVScales` or a path to one.
      page_size: tokens per page.
      max_tokens_per_dispatch: the most tokens that one dispatch adds to a sequence.
      max_model_len: length of the longest sequence; None for the context length of the model.

    Raises `ConfigError` or `CheckpointError` for what the model or the format does not support.
    """
    config = params.config
    scales: KVScales | None
    plan = resolve_plan(kv_dtype)
    if plan is not None:
        specs, scales = _from_plan(plan, config, kv_scales)
    else:
        formats = layer_formats(kv_dtype, config, params.dtype.name)
        dynamic = False
        if _is_auto(kv_scales) and params.kv_scales is None:
            formats, scales = default_scales(params, formats, max_model_len or config.max_len)
        else:
            dynamic, scales = _resolve_scales(params, formats, kv_scales)
        specs = tuple(LayerCacheSpec(fmt, dynamic and fmt.is_fp8) for fmt in formats)
    if scales is None and not all(spec.dynamic for spec in specs):
        scales = KVScales.unit(config.layers)
    return CacheConfig(specs, scales, config, page_size, max_tokens_per_dispatch)


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


def resolve_plan(kv_dtype: object) -> KVPlan | None:
    """Return the plan if `kv_dtype` is a `KVPlan` or a path to one, else None."""
    if looks_like_path(kv_dtype):
        return KVPlan.load(kv_dtype)
    return kv_dtype if isinstance(kv_dtype, KVPlan) else None


def layer_formats(
    kv_dtype: object, config: ModelConfig, weights_dtype: str
) -> tuple[KVFormat, ...]:
    """Return the format of every layer.

    Args:
      kv_dtype: a name for all layers; a list of one name per layer; or a mapping with the keys
        "default" (a name, "auto" if omitted), "skip" (a list of layer numbers, negative ones from
        the end, "sliding_window" or "full_attention") and "skip_dtype" (the format of skipped
        layers, "bfloat16" if omitted).
      config: of the model.
      weights_dtype: the meaning of "auto" if the checkpoint declares no cache format.

    Raises `ConfigError` for anything else.
    """

    def named(name: object) -> KVFormat:
        return kv_format((config.kv_cache_dtype or weights_dtype) if _is_auto(name) else name)

    if isinstance(kv_dtype, str):
        return (named(kv_dtype),) * config.layers
    if isinstance(kv_dtype, Mapping):
        _check_mapping(kv_dtype)
        skipped = {
            layer for entry in kv_dtype.get("skip", ()) for layer in _skipped_layers(entry, config)
        }
        default = named(kv_dtype.get("default", "auto"))
        other = named(kv_dtype.get("skip_dtype", "bfloat16"))
        return tuple(other if layer in skipped else default for layer in range(config.layers))
    if isinstance(kv_dtype, Sequence):
        if len(kv_dtype) != config.layers:
            raise ConfigError(
                f"kv_dtype lists {len(kv_dtype)} layers, and this model has {config.layers}: "
                "give one name per layer, or one name for all layers."
            )
        return tuple(named(name) for name in kv_dtype)
    raise ConfigError(
        f"kv_dtype={kv_dtype!r}: must be {_KV_DTYPE_FORMS}. "
        f"Names are {', '.join(map(repr, KV_DTYPES))}."
    )


def _check_mapping(kv_dtype: Mapping[Any, Any]) -> None:
    for key in kv_dtype:
        if key not in _MAPPING_KEYS:
            raise ConfigError(
                f"kv_dtype has the key {key!r}: must be one of "
                f"{', '.join(map(repr, _MAPPING_KEYS))}.{did_you_mean(key, _MAPPING_KEYS)}"
            )
    skip = kv_dtype.get("skip", ())
    if isinstance(skip, str | int) or not isinstance(skip, Sequence):
        raise ConfigError(
            f"kv_dtype skips {skip!r}: must be a list of layers, such as [0, 'sliding_window']."
        )


def _skipped_layers(entry: object, config: ModelConfig) -> Sequence[int]:
    """Return the layers that one entry of "skip" names."""
    count = config.layers
    if isinstance(entry, str):
        if entry not in LAYER_TYPES:
            raise invalid_choice("kv_dtype['skip']", entry, LAYER_TYPES, "a layer number")
        windowed = entry == "sliding_window"
        return [layer for layer in range(count) if bool(config.window(layer)) == windowed]
    if isinstance(entry, bool) or not isinstance(entry, int) or not -count <= entry < count:
        raise ConfigError(
            f"kv_dtype skips layer {entry!r}: this model's layers are 0 to {count - 1}, or -1 to "
            f"-{count} from the end; {' and '.join(map(repr, LAYER_TYPES))} name all layers of a "
            "type."
        )
    return [entry % count]


def _from_plan(
    plan: KVPlan, config: ModelConfig, kv_scales: object
) -> tuple[tuple[LayerCacheSpec, ...], KVScales]:
    """Return the specs and the scales of a plan.

    Raises `ConfigError` if `kv_scales` is given: a plan contains its scales.
    """
    if not _is_auto(kv_scales):
        raise ConfigError(
            f"kv_scales={kv_scales!r}: kv_dtype is a plan, which contains its scales; "
            "leave kv_scales out."
        )
    plan.check(config.layers)
    check_shape(
        plan.scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim
    )
    return tuple(layer.spec for layer in plan.layers), plan.scales


def _resolve_scales(
    params: Params, formats: tuple[KVFormat, ...], kv_scales: object
) -> tuple[bool, KVScales | None]:
    """Return whether FP8 layers have dynamic scales, and the static ones."""
    config = params.config
    has_fp8 = any(fmt.is_fp8 for fmt in formats)
    is_name = isinstance(kv_scales, str) and not looks_like_path(kv_scales)
    if is_name and kv_scales not in KV_SCALES:
        raise _invalid_scales(kv_scales)
    if is_name and (kv_scales == UNIT or (kv_scales == "auto" and not has_fp8)):
        return False, KVScales.unit(config.layers)
    if not has_fp8:
        raise ConfigError(
            f"kv_scales={kv_scales!r}: scales belong to an FP8 cache, and this one is "
            f"{formats[0].name}; leave them out, or give kv_dtype='fp8'."
        )
    if is_name and kv_scales == TOKEN_HEAD:
        return True, None
    scales = kv_scales
    if is_name:
        if params.kv_scales is None:
            raise ConfigError(
                "kv_scales='checkpoint': the checkpoint has none; try 'unit', 'token_head' or a "
                "KVScales."
            )
        scales = params.kv_scales
    elif looks_like_path(kv_scales):
        scales = KVScales.load(kv_scales)
    if not isinstance(scales, KVScales):
        raise _invalid_scales(kv_scales)
    check_shape(scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim)
    return False, _convert_scales(scales, formats)


def _invalid_scales(kv_scales: object) -> ConfigError:
    return invalid_choice("kv_scales", kv_scales, KV_SCALES, "a KVScales", "a path to one")


def _convert_scales(scales: KVScales, formats: tuple[KVFormat, ...]) -> KVScales:
    """Return the scales for these formats: 1 for layers that are not FP8.

    Scales that were computed for another format are multiplied by the ratio of the largest values
    of the two, with a warning.
    """
    origin = None if scales.kv_dtype is None else kv_format(scales.kv_dtype)
    if all(fmt is origin or (origin is None and fmt.is_fp8) for fmt in formats):
        return scales
    factor = np.ones((len(formats), 1, 1), np.float32)
    if origin is not None:
        for fmt in dict.fromkeys(fmt for fmt in formats if fmt.is_fp8 and fmt is not origin):
            warnings.warn(
                f"The KV scales were computed for {origin.name}: for {fmt.name} they are "
                "multiplied by the ratio of the largest values of the formats, "
                f"{origin.largest:g} / {fmt.largest:g}.",
                stacklevel=2,
            )
        factor[:] = [[[origin.largest / fmt.largest]] for fmt in formats]
    is_fp8 = np.array([fmt.is_fp8 for fmt in formats])[:, None, None]
    k = np.where(is_fp8, scales.k * factor, np.float32(1))
    v = np.where(is_fp8, scales.v * factor, np.float32(1))
    return KVScales(k, v, scales.k_offset)


def context_length(config: ModelConfig, max_model_len: int | None) -> int:
    """Return the most tokens of a sequence: `max_model_len`, or the context length of the model.

    Raises `ConfigError` if `max_model_len` exceeds the context length.
    """
    if max_model_len is None:
        return config.max_len
    if max_model_len > config.max_len:
        raise ConfigError(
            f"max_model_len={max_model_len}: this model was trained for at most {config.max_len} "
            "tokens."
        )
    return max_model_len
