"""What is asked of a comparison, checked as far as that goes without a model."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import SCALE_NAMES, TOKEN_HEAD, KVScales
from jfp8kv.core.errors import ConfigError, invalid_choice
from jfp8kv.core.types import KV_DTYPES
from jfp8kv.quality.calibration_options import plan as calibration_plan
from jfp8kv.quality.needle import DEPTHS, depths_for, lengths_for
from jfp8kv.quality.observers import GRANULARITIES

USUAL_DTYPES, USUAL_SCALES = ("bfloat16", "fp8_e4m3", "fp8_e5m2"), ("auto", TOKEN_HEAD)
NAMED_SCALES = (*SCALE_NAMES, *GRANULARITIES)
_KEYS_BY_LAYER = {
    "default",
    "skip",
    "skip_dtype",
}  # a mapping with one of these is a `kv_dtype`, not labels

Entries = tuple[
    tuple[str | None, Any], ...
]  # what was given, by label; None where it is to be called by what it is


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of `jfp8kv.compare`, resolved as far as that goes without a model."""

    kv_dtypes: Entries
    kv_scales: Entries
    window: int | None
    needle_lengths: tuple[int, ...] | None  # None: the usual ones, as far as the model takes them
    needle_depths: tuple[float, ...]
    max_model_len: int | None


def plan(
    *,
    kv_dtypes: Any = USUAL_DTYPES,
    kv_scales: Any = USUAL_SCALES,
    window: Any = None,
    needle_lengths: Any = None,
    needle_depths: Any = DEPTHS,
    max_model_len: Any = None,
) -> Plan:
    """The arguments of `jfp8kv.compare`, each checked. Raises `ConfigError`."""
    dtypes, scales = _entries("kv_dtypes", kv_dtypes), _entries("kv_scales", kv_scales)
    _check_names("kv_dtype", dtypes, (*KV_DTYPES, "a path to a KVPlan"))
    _check_names("kv_scales", scales, (*NAMED_SCALES, "a KVScales", "a path to one"))
    calibration_plan(
        window=window, max_model_len=max_model_len
    )  # raises for what is no number of tokens
    lengths = None if needle_lengths is None else lengths_for(needle_lengths)
    return Plan(dtypes, scales, window, lengths, depths_for(needle_depths), max_model_len)


def _check_names(what: str, entries: Entries, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a text that is neither a known name nor a file."""
    for _, given in entries:
        if isinstance(given, str) and given not in allowed and not os.path.isfile(given):
            raise invalid_choice(what, given, allowed)


def _entries(name: str, given: Any) -> Entries:
    if isinstance(given, Mapping) and not set(given) & _KEYS_BY_LAYER:
        found = tuple((str(label), entry) for label, entry in given.items())
    elif isinstance(given, str | os.PathLike | KVScales | KVPlan | Mapping):
        found = ((None, given),)
    elif isinstance(given, Iterable):
        found = tuple(map(_labelled, given))
    else:
        raise ConfigError(
            f"{name}={given!r}: must be a list of choices, or a dict of them by label."
        )
    if not found:
        raise ConfigError(f"{name} is empty: give at least one.")
    return found


def _labelled(entry: Any) -> tuple[str | None, Any]:
    """A pair of a label and what is no text is named; anything else is itself (a tuple may be formats by layer)."""
    if (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and not isinstance(entry[1], str)
    ):
        return entry
    return None, entry
