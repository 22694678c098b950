"""The caches that `compare` runs: every format with every kind of scales, checked and labelled."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jfp8kv.cache.config import CacheConfig, layer_formats, resolve_cache, resolve_plan
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import UNIT, KVScales
from jfp8kv.core.formats import FLOAT32
from jfp8kv.engine.options import KVDtype, KVScalesLike
from jfp8kv.models.params import Params
from jfp8kv.quality.calibrate import Calibrator, amax_scales
from jfp8kv.quality.data import Windows
from jfp8kv.quality.observe import PAGE_SIZE
from jfp8kv.quality.observers import AmaxObserver
from jfp8kv.quality.options import (
    GRANULARITIES,
    SCALES_NAMES,
    CompareOptions,
    Granularity,
    Labelled,
)

BASELINE = "float32"
PLANNED = "planned"
_MAX_LABEL = 40


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """A cache to run: `kv_dtype` and `kv_scales` as `LLM` takes them, and the labels of reports.

    Attributes:
      label: the name of the cache in reports.
      dtype_label, scales_label: the names of its format and its scales; `scales_label` is "" for
        formats without scales.
      calibrate: the granularity of scales that have yet to be calibrated, or None.
    """

    label: str
    kv_dtype: KVDtype
    kv_scales: KVScalesLike
    dtype_label: str
    scales_label: str
    calibrate: Granularity | None = None


def cache_choices(
    params: Params, options: CompareOptions, *, max_model_len: int | None = None
) -> list[CacheChoice]:
    """Return the float32 cache, then each format with each kind of scales.

    A format that is not FP8 appears once, because it has no scales, and so does a KV plan, which
    contains its scales. float32 is not repeated. Equal labels are numbered.

    Raises `ConfigError` or `CheckpointError` for a cache that an engine for sequences of up to
    `max_model_len` tokens would refuse.
    """
    builder = _Builder(params, options.scales_choices, max_model_len)
    choices = [CacheChoice(BASELINE, BASELINE, UNIT, BASELINE, "")]
    for label, kv_dtype in options.dtype_choices:
        choices += builder.choices(label, kv_dtype)
    return list(_number_duplicates(choices))


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Creates the caches of each format, and checks that an engine would accept them."""

    params: Params
    kv_scales: tuple[Labelled[KVScalesLike], ...]
    max_model_len: int | None

    def choices(self, label: str | None, kv_dtype: KVDtype) -> Iterator[CacheChoice]:
        """Yield the caches of one format, of one list of formats by layer, or of one plan."""
        plan = resolve_plan(kv_dtype)
        if plan is not None:
            self._resolve(plan, "auto")
            label = label or _plan_label(kv_dtype)
            yield CacheChoice(label, plan, "auto", label, PLANNED)
            return
        formats = layer_formats(kv_dtype, self.params.config, self.params.dtype.name)
        label = label or _shorten(self._resolve(kv_dtype, UNIT).name)
        if any(fmt.is_fp8 for fmt in formats):
            yield from self._with_scales(label, kv_dtype)
        elif not all(fmt is FLOAT32 for fmt in formats):
            yield CacheChoice(label, kv_dtype, UNIT, label, "")

    def _with_scales(self, label: str, kv_dtype: KVDtype) -> Iterator[CacheChoice]:
        for scales_label, scales in self.kv_scales:
            granularity = _granularity(scales)
            if granularity is None:
                self._resolve(kv_dtype, scales)
            scales_label = scales_label or _scales_label(scales)
            yield CacheChoice(
                f"{label} {scales_label}", kv_dtype, scales, label, scales_label, granularity
            )

    def _resolve(self, kv_dtype: KVDtype, kv_scales: KVScalesLike) -> CacheConfig:
        return resolve_cache(
            self.params,
            kv_dtype,
            kv_scales,
            page_size=PAGE_SIZE,
            max_tokens_per_dispatch=1,
            max_model_len=self.max_model_len,
        )


def with_calibrated_scales(
    params: Params, choices: Sequence[CacheChoice], prompts: Iterable[Windows]
) -> list[CacheChoice]:
    """Return `choices`, with scales calibrated on `prompts` where `calibrate` is set.

    The scales equal those of `jfp8kv.calibrate`, bit for bit. One pass over the data is enough,
    because the amax of each channel determines that of a head and of a tensor.
    """
    if all(choice.calibrate is None for choice in choices):
        return list(choices)
    calibrator = Calibrator(params, "channel")
    amax = calibrator.run(prompts, AmaxObserver.empty(calibrator.shape))
    calibrated = []
    for choice in choices:
        if choice.calibrate is not None:
            formats = layer_formats(choice.kv_dtype, params.config, params.dtype.name)
            scales = amax_scales(amax, calibrator.shape, choice.calibrate, formats)
            choice = dataclasses.replace(choice, kv_scales=scales, calibrate=None)
        calibrated.append(choice)
    return calibrated


def _granularity(scales: KVScalesLike) -> Granularity | None:
    """Return the granularity that `scales` names, or None."""
    return next(
        (name for name in GRANULARITIES if isinstance(scales, str) and scales == name), None
    )


def _plan_label(kv_dtype: KVDtype) -> str:
    return "plan" if isinstance(kv_dtype, KVPlan) else Path(str(kv_dtype)).name


def _scales_label(scales: KVScalesLike) -> str:
    if isinstance(scales, KVScales):
        return f"given, per {scales.granularity}"
    return str(scales) if scales in SCALES_NAMES else Path(scales).name


def _number_duplicates(choices: Iterable[CacheChoice]) -> Iterator[CacheChoice]:
    seen: Counter[str] = Counter()
    for choice in choices:
        seen[choice.label] += 1
        number = seen[choice.label]
        label = choice.label if number == 1 else f"{choice.label} ({number})"
        yield dataclasses.replace(choice, label=label)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 3]}..."
