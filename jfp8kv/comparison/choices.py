"""The caches to compare: every format with every kind of scales, each named, all checked before anything runs."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import NAMED, TOKEN_HEAD, UNIT, KVScales
from jfp8kv.calibration.observers import GRANULARITIES, Peaks, Units
from jfp8kv.calibration.run import Watch
from jfp8kv.core.errors import ConfigError, one_of
from jfp8kv.core.formats import FLOAT32, KV_DTYPES
from jfp8kv.engine.kv import setup
from jfp8kv.engine.kv_dtype import layer_formats, plan_of
from jfp8kv.models.params import Params

BASE, PLANNED = "float32", "planned"
USUAL_DTYPES, USUAL_SCALES = ("bfloat16", "fp8_e4m3", "fp8_e5m2"), (UNIT, TOKEN_HEAD)
_ALLOWED_SCALES = (*NAMED, *GRANULARITIES)
_KEYS_OF_LAYERS = {"default", "skip", "skip_dtype"}  # a mapping with these is a `kv_dtype`, not labels


@dataclasses.dataclass(frozen=True)
class Choice:
    """A cache: `kv_dtype` and `kv_scales` as an engine takes them, or a granularity to calibrate; what to call all three."""

    label: str
    kv_dtype: Any
    kv_scales: Any
    dtype_label: str
    scales_label: str  # "" where scales have no place

    @property
    def calibrated(self) -> bool:
        """Whether its scales are to be found here."""
        return isinstance(self.kv_scales, str) and self.kv_scales in GRANULARITIES


def choices(params: Params, kv_dtypes: Any, kv_scales: Any) -> list[Choice]:
    """The float32 cache, then each of `kv_dtypes` with each of `kv_scales`; what is not FP8 comes once, and so do plans, which
    bring their own scales; float32 never again.

    Raises `ConfigError` or `CheckpointError` for what an engine would not take.
    """
    dtypes, scales = _entries("kv_dtypes", kv_dtypes), _entries("kv_scales", kv_scales)
    check_names([entry for _, entry in dtypes], [entry for _, entry in scales])
    found = [Choice(BASE, BASE, UNIT, BASE, "")]
    for label, kv_dtype in dtypes:
        found += _of_dtype(params, label, kv_dtype, scales)
    return _told_apart(found)


def check_names(kv_dtypes: Iterable[Any], kv_scales: Iterable[Any]) -> None:
    """Raise `ConfigError` for a text that is neither a known name nor a file: all that can be told without a model."""
    for given in kv_dtypes:
        if isinstance(given, str) and given not in KV_DTYPES and not os.path.isfile(given):
            raise one_of("kv_dtype", given, (*KV_DTYPES, "a path to a KVPlan"))
    for given in kv_scales:
        if isinstance(given, str) and given not in _ALLOWED_SCALES and not os.path.isfile(given):
            raise one_of("kv_scales", given, (*_ALLOWED_SCALES, "a KVScales", "a path to one"))


def _of_dtype(params: Params, label: str | None, kv_dtype: Any, scales: list[tuple[str | None, Any]]) -> Iterator[Choice]:
    """The caches of one format, or one mixture of formats."""
    plan = plan_of(kv_dtype)
    if plan is not None:
        label = label or _plan_label(kv_dtype)
        setup(params, plan, "auto", page_size=64, span=1)
        yield Choice(label, plan, "auto", label, PLANNED)
        return
    formats = layer_formats(kv_dtype, params.config, params.dtype.name)
    label = label or _short(setup(params, kv_dtype, UNIT, page_size=64, span=1).name)
    if all(fmt is FLOAT32 for fmt in formats):
        return
    if not any(fmt.is_fp8 for fmt in formats):
        yield Choice(label, kv_dtype, UNIT, label, "")
        return
    for scales_label, each in scales:
        scales_label = scales_label or _scales_label(each)
        choice = Choice(f"{label} {scales_label}", kv_dtype, each, label, scales_label)
        if not choice.calibrated:
            setup(params, kv_dtype, each, page_size=64, span=1)
        yield choice


def with_calibrated(params: Params, asked: Sequence[Choice], prompts: Iterable[list[list[int]]]) -> list[Choice]:
    """`asked` with scales found from `prompts`, for each choice that wants some: those of `jfp8kv.calibrate`, bit for bit.

    The data is gone through once: the largest magnitude by channel says what it is by head and by tensor.
    """
    if not any(choice.calibrated for choice in asked):
        return list(asked)
    c = params.config
    units = Units(c.layers, c.kv_heads, c.head_dim, "channel")
    seen = Watch(params, units).over(prompts, Peaks.empty(units))
    return [_calibrated(params, choice, units, seen) if choice.calibrated else choice for choice in asked]


def _calibrated(params: Params, choice: Choice, units: Units, seen: Peaks) -> Choice:
    """The choice with its scales, each layer's for the format it has; 1 where that is not FP8."""
    formats = layer_formats(choice.kv_dtype, params.config, params.dtype.name)
    peaks = seen.shared(dataclasses.replace(units, granularity=choice.kv_scales))
    scales = np.ones_like(peaks.amax)
    for fmt in dict.fromkeys(fmt for fmt in formats if fmt.is_fp8):
        layers = [layer for layer, each in enumerate(formats) if each is fmt]
        scales[layers] = peaks.scales(fmt)[layers]
    made_for = formats[0].name if len(set(formats)) == 1 else None
    return dataclasses.replace(choice, kv_scales=KVScales(scales[:, 0], scales[:, 1], kv_dtype=made_for))


# -- labels -------------------------------------------------------------------------------------------------------------


def _entries(name: str, given: Any) -> list[tuple[str | None, Any]]:
    """What was given, by label; None where it is to be called by what it is."""
    if isinstance(given, Mapping) and not set(given) & _KEYS_OF_LAYERS:
        found = [(str(label), entry) for label, entry in given.items()]
    elif isinstance(given, str | os.PathLike | KVScales | KVPlan | Mapping):
        found = [(None, given)]
    elif isinstance(given, Iterable):
        found = [_labelled(entry) for entry in given]
    else:
        raise ConfigError(f"{name}={given!r}: must be a list of choices, or a dict of them by label.")
    if not found:
        raise ConfigError(f"{name} is empty: give at least one.")
    return found


def _labelled(entry: Any) -> tuple[str | None, Any]:
    """A pair of a label and what is no text is named; anything else is itself (a tuple may be formats by layer)."""
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and not isinstance(entry[1], str):
        return entry
    return None, entry


def _plan_label(kv_dtype: Any) -> str:
    return "plan" if isinstance(kv_dtype, KVPlan) else Path(kv_dtype).name


def _scales_label(scales: Any) -> str:
    if isinstance(scales, KVScales):
        return f"given, by {scales.granularity}"
    known = isinstance(scales, str) and scales in _ALLOWED_SCALES
    return str(scales) if known or not isinstance(scales, str | os.PathLike) else Path(scales).name


def _told_apart(found: Iterable[Choice]) -> list[Choice]:
    """Choices of one label get numbers."""

    def numbered() -> Iterator[Choice]:
        seen: dict[str, int] = {}
        for choice in found:
            number = seen[choice.label] = seen.get(choice.label, 0) + 1
            yield choice if number == 1 else dataclasses.replace(choice, label=f"{choice.label} ({number})")

    return list(numbered())


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
