"""What is asked of a calibration, checked before anything runs."""

import dataclasses
import math
from typing import Any

from jfp8kv.cache.config import context_length, positive
from jfp8kv.core.errors import ConfigError, invalid_choice
from jfp8kv.core.formats import FORMATS, KVFormat, kv_format
from jfp8kv.models.config import ModelConfig
from jfp8kv.quality.observers import GRANULARITIES

OBSERVERS = ("amax", "percentile", "mse")
PERCENTILE = 99.99


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of `jfp8kv.calibrate`, resolved as far as that goes without a model."""

    fmt: KVFormat
    granularity: str
    observer: str
    percentile: float
    window: int | None
    max_model_len: int | None
    k_offset: bool
    headroom: float

    def most_tokens(self, config: ModelConfig) -> int:
        """Most tokens of one text. Raises `ConfigError` for more than the model takes."""
        if self.window is not None and self.window > config.max_len:
            raise ConfigError(
                f"window={self.window}: this model was trained for at most {config.max_len} tokens."
            )
        return context_length(config, self.max_model_len)


def plan(
    *,
    kv_dtype: Any = "fp8_e4m3",
    granularity: Any = "head",
    observer: Any = "amax",
    percentile: Any = None,
    window: Any = None,
    max_model_len: Any = None,
    k_offset: Any = False,
    headroom: Any = 1.0,
) -> Plan:
    """The arguments of `jfp8kv.calibrate`, each checked. Raises `ConfigError`."""
    if not _is_one_of(granularity, GRANULARITIES):
        raise invalid_choice("granularity", granularity, GRANULARITIES)
    if not _is_one_of(observer, OBSERVERS):
        raise invalid_choice("observer", observer, OBSERVERS)
    if not isinstance(k_offset, bool):
        raise ConfigError(f"k_offset={k_offset!r}: must be True or False.")
    if k_offset and observer != "amax":
        raise ConfigError(f"k_offset=True goes with observer='amax', and this one is {observer!r}.")
    if not _is_number(headroom) or not 1 <= headroom < math.inf:
        raise ConfigError(f"headroom={headroom!r}: must be a number of at least 1, such as 2.")
    if headroom != 1 and observer != "amax":
        raise ConfigError(
            f"headroom={headroom!r}: goes with observer='amax', and this one is {observer!r}."
        )
    if percentile is not None and observer != "percentile":
        raise ConfigError(
            f"percentile={percentile!r}: belongs to observer='percentile', and this one is {observer!r}."
        )
    for name, value in (("window", window), ("max_model_len", max_model_len)):
        positive(name, value)
    if window is not None and max_model_len is not None and window > max_model_len:
        raise ConfigError(f"window={window}: must be at most max_model_len={max_model_len}.")
    return Plan(
        _fp8(kv_dtype),
        granularity,
        observer,
        _percent(percentile),
        window,
        max_model_len,
        k_offset,
        float(headroom),
    )


def _is_one_of(given: Any, allowed: tuple[str, ...]) -> bool:
    return isinstance(given, str) and given in allowed


def _fp8(kv_dtype: Any) -> KVFormat:
    allowed = ("fp8", *(name for name, fmt in FORMATS.items() if fmt.is_fp8))
    if isinstance(kv_dtype, str) and kv_dtype in FORMATS and kv_dtype not in allowed:
        known = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"kv_dtype={kv_dtype!r}: scales belong to an FP8 cache, of kv_dtype {known}."
        )
    if not _is_one_of(kv_dtype, allowed):
        raise invalid_choice("kv_dtype", kv_dtype, allowed)
    return kv_format(kv_dtype)


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def _percent(percentile: Any) -> float:
    if percentile is None:
        return PERCENTILE
    if not _is_number(percentile) or not math.isfinite(percentile) or not 0 < percentile <= 100:
        raise ConfigError(
            f"percentile={percentile!r}: must be a number above 0 and up to 100, such as {PERCENTILE}."
        )
    return float(percentile)
