"""The caches to compare: every format with every kind of scales, each named, all checked before anything runs."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jfp8kv.cache.scales import NAMED, TOKEN_HEAD, UNIT, KVScales
from jfp8kv.calibration.observers import GRANULARITIES, Peaks, Units, to_scales
from jfp8kv.calibration.run import Watch
from jfp8kv.core.errors import ConfigError, one_of
from jfp8kv.core.formats import KVFormat
from jfp8kv.engine.kv import setup
from jfp8kv.models.params import Params

BASE = "float32"
KV_DTYPES, KV_SCALES = ("bfloat16", "fp8_e4m3", "fp8_e5m2"), (UNIT, TOKEN_HEAD)


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
    """The float32 cache, then each of `kv_dtypes` with each of `kv_scales`; what is not FP8 comes once, float32 never again.

    Raises `ConfigError` or `CheckpointError` for what an engine would not take.
    """
    dtypes, scales = _entries("kv_dtypes", kv_dtypes), _entries("kv_scales", kv_scales)
    found = [Choice(BASE, BASE, UNIT, BASE, "")]
    for dtype_label, kv_dtype in dtypes:
        formats = layer_formats(params, kv_dtype)
        plain = isinstance(kv_dtype, str)
        dtype_label = dtype_label or (formats[0].name if plain else _short(str(kv_dtype)))
        if plain and formats[0].name == BASE:
            continue
        if not any(fmt.is_fp8 for fmt in formats):
            found.append(Choice(dtype_label, kv_dtype, UNIT, dtype_label, ""))
            continue
        for scales_label, each in scales:
            scales_label = scales_label or _scales_label(each)
            choice = Choice(f"{dtype_label} {scales_label}", kv_dtype, each, dtype_label, scales_label)
            if not choice.calibrated:
                _check_scales(params, choice)
            found.append(choice)
    return _told_apart(found)


def layer_formats(params: Params, kv_dtype: Any) -> list[KVFormat]:
    """The format of each layer's cache. Raises `ConfigError` for what is no `kv_dtype`."""
    return [setup(params, kv_dtype, UNIT, page_size=64, span=1).fmt] * params.config.layers


def with_calibrated(params: Params, asked: Sequence[Choice], prompts: Iterable[list[list[int]]]) -> list[Choice]:
    """`asked` with scales found from `prompts`, for each choice that wants some: those of `jfp8kv.calibrate`, bit for bit.

    The data is gone through once: the largest magnitude by channel says what it is by head and by tensor.
    """
    if not any(choice.calibrated for choice in asked):
        return list(asked)
    c = params.config
    units = Units(c.layers, c.kv_heads, c.head_dim, "channel")
    amax = np.asarray(Watch(params, units).over(prompts, Peaks.empty(units)).amax)
    return [_calibrated(params, choice, amax) if choice.calibrated else choice for choice in asked]


def _calibrated(params: Params, choice: Choice, amax: np.ndarray) -> Choice:
    over = {"tensor": (2, 3), "head": (3,), "channel": ()}[choice.kv_scales]
    peaks = amax.max(axis=over, keepdims=True) if over else amax
    scales = np.stack([to_scales(peak, fmt) for peak, fmt in zip(peaks, layer_formats(params, choice.kv_dtype), strict=True)])
    return dataclasses.replace(choice, kv_scales=KVScales(scales[:, 0], scales[:, 1]))


def _entries(name: str, given: Any) -> list[tuple[str | None, Any]]:
    """What was given, by label; None where it is to be called by what it is."""
    if isinstance(given, Mapping):
        found = [(str(label), entry) for label, entry in given.items()]
    elif isinstance(given, str | os.PathLike | KVScales):
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


def _scales_label(scales: Any) -> str:
    if isinstance(scales, KVScales):
        return f"given, by {scales.granularity}"
    known = isinstance(scales, str) and scales in (*NAMED, *GRANULARITIES)
    return str(scales) if known or not isinstance(scales, str | os.PathLike) else Path(scales).name


def _check_scales(params: Params, choice: Choice) -> None:
    """Raise what an engine would, with the granularities among what is allowed."""
    given = choice.kv_scales
    allowed = (*NAMED, *GRANULARITIES)
    if isinstance(given, str) and given not in allowed and os.path.sep not in given and not os.path.exists(given):
        raise one_of("kv_scales", given, (*allowed, "a KVScales", "a path to one"))
    setup(params, choice.kv_dtype, given, page_size=64, span=1)


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
