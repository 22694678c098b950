"""The caches to compare: every format with every kind of scales, each named, all checked before anything runs."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jfp8kv.cache.config import CacheConfig, layer_formats, resolve_cache, resolve_plan
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import UNIT, KVScales
from jfp8kv.core.formats import FLOAT32
from jfp8kv.models.params import Params
from jfp8kv.quality.calibrate import Calibrator
from jfp8kv.quality.compare_options import NAMED_SCALES, Entries
from jfp8kv.quality.observers import GRANULARITIES, AmaxObserver, ScaleShape

BASE, PLANNED = "float32", "planned"
_LONGEST_LABEL = 40


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """A cache: `kv_dtype` and `kv_scales` as an engine takes them, or a granularity to calibrate; what to call all three."""

    label: str
    kv_dtype: Any
    kv_scales: Any
    dtype_label: str
    scales_label: str  # "" where scales have no place

    @property
    def calibrated(self) -> bool:
        """Whether its scales are to be found here."""
        return _to_calibrate(self.kv_scales)


def _to_calibrate(kv_scales: Any) -> bool:
    return isinstance(kv_scales, str) and kv_scales in GRANULARITIES


def choices(
    params: Params, kv_dtypes: Entries, kv_scales: Entries, *, longest: int | None = None
) -> list[CacheChoice]:
    """The float32 cache, then each of `kv_dtypes` with each of `kv_scales`; what is not FP8 comes once, and so do plans, which
    bring their own scales; float32 never again.

    Raises `ConfigError` or `CheckpointError` for what an engine for texts of up to `longest` tokens would not take.
    """
    check = partial(resolve_cache, params, page_size=64, max_tokens_per_dispatch=1, longest=longest)
    found = [CacheChoice(BASE, BASE, UNIT, BASE, "")]
    for label, kv_dtype in kv_dtypes:
        found += _of_dtype(params, label, kv_dtype, kv_scales, check)
    return _told_apart(found)


def _of_dtype(
    params: Params,
    label: str | None,
    kv_dtype: Any,
    scales: Entries,
    check: Callable[..., CacheConfig],
) -> Iterator[CacheChoice]:
    """The caches of one format, or of one mixture of formats; `check` is what an engine makes of both, or raises."""
    plan = resolve_plan(kv_dtype)
    if plan is not None:
        check(plan, "auto")
        label = label or ("plan" if isinstance(kv_dtype, KVPlan) else Path(kv_dtype).name)
        yield CacheChoice(label, plan, "auto", label, PLANNED)
        return
    formats = layer_formats(kv_dtype, params.config, params.dtype.name)
    label = label or _short(check(kv_dtype, UNIT).name)
    if not any(fmt.is_fp8 for fmt in formats):
        if not all(fmt is FLOAT32 for fmt in formats):
            yield CacheChoice(label, kv_dtype, UNIT, label, "")
        return
    for scales_label, each in scales:
        if not _to_calibrate(each):
            check(kv_dtype, each)
        scales_label = scales_label or _scales_label(each)
        yield CacheChoice(f"{label} {scales_label}", kv_dtype, each, label, scales_label)


def with_calibrated(
    params: Params, asked: Sequence[CacheChoice], prompts: Iterable[list[list[int]]]
) -> list[CacheChoice]:
    """`asked` with scales found from `prompts`, for each choice that wants some: those of `jfp8kv.calibrate`, bit for bit.

    The data is gone through once: the largest magnitude by channel says what it is by head and by tensor.
    """
    if not any(choice.calibrated for choice in asked):
        return list(asked)
    c = params.config
    units = ScaleShape(c.layers, c.kv_heads, c.head_dim, "channel")
    seen = Calibrator(params, units).over(prompts, AmaxObserver.empty(units))
    return [
        _calibrated(params, choice, units, seen) if choice.calibrated else choice
        for choice in asked
    ]


def _calibrated(
    params: Params, choice: CacheChoice, units: ScaleShape, seen: AmaxObserver
) -> CacheChoice:
    """The choice with its scales, each layer's for the format it has; 1 where that is not FP8."""
    formats = layer_formats(choice.kv_dtype, params.config, params.dtype.name)
    peaks = seen.shared(dataclasses.replace(units, granularity=choice.kv_scales))
    scales = np.ones_like(peaks.amax)
    for fmt in dict.fromkeys(fmt for fmt in formats if fmt.is_fp8):
        layers = [layer for layer, each in enumerate(formats) if each is fmt]
        scales[layers] = peaks.scales(fmt)[layers]
    made_for = formats[0].name if len(set(formats)) == 1 else None
    return dataclasses.replace(
        choice, kv_scales=KVScales(scales[:, 0], scales[:, 1], kv_dtype=made_for)
    )


def _scales_label(scales: Any) -> str:
    if isinstance(scales, KVScales):
        return f"given, by {scales.granularity}"
    return scales if scales in NAMED_SCALES else Path(scales).name


def _told_apart(found: Iterable[CacheChoice]) -> list[CacheChoice]:
    """Choices of one label get numbers."""

    def numbered() -> Iterator[CacheChoice]:
        seen: dict[str, int] = {}
        for choice in found:
            number = seen[choice.label] = seen.get(choice.label, 0) + 1
            yield (
                choice
                if number == 1
                else dataclasses.replace(choice, label=f"{choice.label} ({number})")
            )

    return list(numbered())


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."
