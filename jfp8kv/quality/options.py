"""Options of `calibrate`, `compare`, `plan_kv` and `bench`.

Each option is declared once, with its default, range and help. The keywords of the functions, YAML
configs and the command line are derived from these classes. Importing this module does not import
JAX.
"""

import math
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from jfp8kv.core.errors import ConfigError, invalid_choice
from jfp8kv.core.options import Options, option, options
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.sizes import parse_bytes
from jfp8kv.core.types import KV_DTYPES, KV_SCALES, AttentionName
from jfp8kv.engine.options import KVDtype, KVScalesLike
from jfp8kv.quality.needle import DEPTHS, MIN_LENGTH

FP8Name: TypeAlias = Literal["fp8", "fp8_e4m3", "fp8_e5m2"]
Granularity: TypeAlias = Literal["tensor", "head", "channel"]
ObserverName: TypeAlias = Literal["amax", "percentile", "mse"]
FP8_NAMES: tuple[FP8Name, ...] = typing.get_args(FP8Name)
GRANULARITIES: tuple[Granularity, ...] = typing.get_args(Granularity)
OBSERVERS: tuple[ObserverName, ...] = typing.get_args(ObserverName)
SCALES_NAMES = (*KV_SCALES, *GRANULARITIES)
DEFAULT_PERCENTILE = 99.99

KVDtypes: TypeAlias = KVDtype | Iterable[KVDtype | tuple[str, KVDtype]] | Mapping[str, KVDtype]
"""`kv_dtype` of one or several caches, or a mapping of labels to those."""
KVScalesList: TypeAlias = (
    KVScalesLike | Iterable[KVScalesLike | tuple[str, KVScalesLike]] | Mapping[str, KVScalesLike]
)
"""`kv_scales` of one or several caches, or a mapping of labels to those."""

T = TypeVar("T")


class Labelled(NamedTuple, Generic[T]):
    """A value with the label that reports use; None to derive one from the value."""

    label: str | None
    value: T


def _fp8_name(value: Any) -> Any:
    if isinstance(value, str) and value in KV_DTYPES and value not in FP8_NAMES:
        known = ", ".join(map(repr, FP8_NAMES))
        raise ConfigError(
            f"kv_dtype={value!r}: scales belong to an FP8 cache, with a kv_dtype of {known}."
        )
    if not isinstance(value, str) or value not in FP8_NAMES:
        raise invalid_choice("kv_dtype", value, FP8_NAMES)
    return _canonical(value)


def _canonical(name: str) -> str:
    return "fp8_e4m3" if name == "fp8" else name


def _check_window(window: int | None, max_model_len: int | None) -> None:
    if window is not None and max_model_len is not None and window > max_model_len:
        raise ConfigError(f"window={window}: must be at most max_model_len={max_model_len}.")


@options
class CalibrationOptions(Options):
    """How static scales are derived from the keys and values of sample prompts."""

    kv_dtype: FP8Name = option(
        default="fp8_e4m3", help="FP8 format that the scales are for.", convert=_fp8_name
    )
    granularity: Granularity = option(
        default="head",
        help="What shares a scale in a layer: all of K (all of V), a KV head, or a channel.",
    )
    observer: ObserverName = option(
        default="amax",
        help=(
            'How a scale is chosen. "amax" maps the largest magnitude to the largest value of the '
            'format, "percentile" a percentile of the magnitudes. "mse" minimizes the squared '
            "error over 25 candidates, from the scale of amax down to 1/8 of it, in a second pass."
        ),
    )
    percentile: float | None = option(
        default=None,
        help='Percentile of the magnitudes with observer="percentile". By default 99.99.',
        above=0,
        maximum=100,
        hint=f"such as {DEFAULT_PERCENTILE}",
    )
    window: int | None = option(
        default=None,
        help=(
            "Split prompts into windows of this many tokens, each a separate sequence. By default "
            "each prompt is run whole."
        ),
        minimum=1,
    )
    max_model_len: int | None = option(
        default=None,
        help=(
            "Maximum number of tokens of a prompt or window, and the context that K offsets allow "
            "for. By default the model's limit."
        ),
        minimum=1,
    )
    k_offset: bool = option(
        default=False,
        help=(
            "Also compute K offsets: the constant part of the keys, which is subtracted before "
            'keys are stored. For models with a large K bias. Needs observer="amax" and a second '
            "pass."
        ),
    )
    headroom: float = option(
        default=1.0,
        help=(
            'Factor on amax with observer="amax": other prompts have larger values, which are '
            "clipped. 2 costs precision only in the smallest values."
        ),
        minimum=1,
        hint="such as 2",
    )

    def check(self) -> None:
        """Check the options of single observers, and that a window fits the context."""
        needs = "the observer is"
        if self.k_offset and self.observer != "amax":
            raise ConfigError(f"k_offset=True needs observer='amax'; {needs} {self.observer!r}.")
        if self.headroom != 1 and self.observer != "amax":
            raise ConfigError(
                f"headroom={self.headroom!r} needs observer='amax'; {needs} {self.observer!r}."
            )
        if self.percentile is not None and self.observer != "percentile":
            raise ConfigError(
                f"percentile={self.percentile!r} needs observer='percentile'; {needs} "
                f"{self.observer!r}."
            )
        _check_window(self.window, self.max_model_len)

    @property
    def percent(self) -> float:
        """The percentile, or its default."""
        return DEFAULT_PERCENTILE if self.percentile is None else self.percentile


# -- compare ---------------------------------------------------------------------------------------

_LAYER_KEYS = {"default", "skip", "skip_dtype"}  # a mapping with one of these is one `kv_dtype`


def _labelled(name: str, value: Any) -> tuple[Labelled[Any], ...]:
    """Return the choices in `value`: one, several, or a mapping of labels to choices."""
    if isinstance(value, Mapping) and not set(value) & _LAYER_KEYS:
        found = tuple(Labelled(str(label), entry) for label, entry in value.items())
    elif isinstance(value, str | os.PathLike | Mapping) or _is_plan_or_scales(value):
        found = (Labelled(None, value),)
    elif isinstance(value, Iterable):
        found = tuple(map(_entry, value))
    else:
        raise ConfigError(
            f"{name}={value!r}: must be a list of choices, or a mapping of labels to choices."
        )
    if not found:
        raise ConfigError(f"{name} is empty: give at least one.")
    return found


def _is_plan_or_scales(value: object) -> bool:
    from jfp8kv.cache.plan import KVPlan  # imports JAX
    from jfp8kv.cache.scales import KVScales

    return isinstance(value, KVPlan | KVScales)


def _entry(value: Any) -> Labelled[Any]:
    """Return `value` with its label. A tuple of two strings is a list of formats, not a pair."""
    if isinstance(value, Labelled):
        return value
    if isinstance(value, tuple) and len(value) == 2:
        label, entry = value
        if isinstance(label, str) and not isinstance(entry, str):
            return Labelled(label, entry)
    return Labelled(None, value)


def _check_names(name: str, values: Iterable[Any], known: Sequence[str], *other: str) -> None:
    """Raise `ConfigError` for a string that is neither a known name nor a path to a file."""
    for value in values:
        if not isinstance(value, str) or value in known:
            continue
        if not (looks_like_path(value) and os.path.isfile(value)):
            raise invalid_choice(name, value, known, *other)


def _kv_dtypes(value: Any) -> tuple[Labelled[Any], ...]:
    found = _labelled("kv_dtypes", value)
    _check_names("kv_dtype", (entry.value for entry in found), KV_DTYPES, "a path to a KVPlan")
    return found


def _kv_scales(value: Any) -> tuple[Labelled[Any], ...]:
    found = _labelled("kv_scales", value)
    values = (entry.value for entry in found)
    _check_names("kv_scales", values, SCALES_NAMES, "a KVScales", "a path to one")
    return found


@options
class CompareOptions(Options):
    """Which caches are compared, and on what.

    `dtype_choices` and `scales_choices` are the stored form of `kv_dtypes` and `kv_scales`.
    """

    kv_dtypes: KVDtypes = option(
        default=("bfloat16", "fp8_e4m3", "fp8_e5m2"),
        help=(
            "Formats of the caches, each as `kv_dtype` of `LLM`. A mapping labels them. The "
            "float32 cache always comes first. A KVPlan has its scales."
        ),
        convert=_kv_dtypes,
    )
    kv_scales: KVScalesList = option(
        default=("auto", "token_head"),
        help=(
            'Scales of the FP8 formats, each as `kv_scales` of `LLM`; "tensor", "head" and '
            '"channel" are calibrated by amax on `calibration`. A mapping labels them, as does a '
            "pair of a label and a KVScales."
        ),
        convert=_kv_scales,
    )
    window: int | None = option(
        default=None,
        help=(
            "Split texts into windows of this many tokens, each a separate sequence. By default "
            "max_model_len."
        ),
        minimum=1,
    )
    needle_lengths: Sequence[int] | None = option(
        default=None,
        help=(
            "Prompt lengths of the needle-in-a-haystack test, in tokens. By default 256 and 1024, "
            "as far as the model allows; an empty list skips the test."
        ),
        minimum=MIN_LENGTH,
        hint="an empty list skips the test",
    )
    needle_depths: Sequence[float] = option(
        default=DEPTHS,
        help="Positions of the needle, from 0 (the beginning of the prompt) to 1 (the end).",
        minimum=0,
        maximum=1,
    )
    max_model_len: int | None = option(
        default=None,
        help="Maximum number of tokens of a window. By default the model's limit.",
        minimum=1,
    )

    def check(self) -> None:
        """Check that a window fits the context."""
        _check_window(self.window, self.max_model_len)

    @property
    def dtype_choices(self) -> tuple[Labelled[KVDtype], ...]:
        """`kv_dtypes` with their labels."""
        return _labelled("kv_dtypes", self.kv_dtypes)

    @property
    def scales_choices(self) -> tuple[Labelled[KVScalesLike], ...]:
        """`kv_scales` with their labels."""
        return _labelled("kv_scales", self.kv_scales)


# -- plan_kv ---------------------------------------------------------------------------------------


def _percentage(budget: Any) -> float | None:
    """Return 60.0 for "60%", and None for anything but a percentage."""
    if not isinstance(budget, str):
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", budget)
    return float(match[1]) if match else None


def _budget(value: Any) -> Any:
    if value is None or _percentage(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    if isinstance(value, str):
        try:
            return float(parse_bytes(value))
        except ConfigError:
            pass
    raise ConfigError(
        f"budget={value!r}: must be bytes per token, such as 2048 or '2KiB', or a percentage of a "
        "bfloat16 cache, such as '60%'."
    )


def _format_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        known = ", ".join(map(repr, KV_DTYPES[1:]))
        raise ConfigError(f"kv_dtypes={value!r}: must be a list of formats, of {known}.")
    for name in value:
        if name not in KV_DTYPES[1:]:
            raise invalid_choice("kv_dtype", name, KV_DTYPES[1:])
    return tuple(dict.fromkeys(map(_canonical, value)))


@options
class PlanOptions(Options):
    """The budget of a mixed-precision plan and the formats it may use."""

    budget: float | str | None = option(
        default=None,
        help=(
            'Maximum bytes of cache per token, as in `llm.stats`: 2048, "2KiB", or "60%" of a '
            "bfloat16 cache."
        ),
        convert=_budget,
    )
    max_loss: float | None = option(
        default=None,
        help=(
            "Maximum KL divergence from the unquantized cache, in nats per token, instead of a "
            "budget."
        ),
        above=0,
        hint="nats per token, such as 0.01",
    )
    kv_dtypes: Sequence[str] = option(
        default=("bfloat16", "fp8_e4m3"), help="Formats to choose from.", convert=_format_names
    )
    window: int | None = option(
        default=None,
        help="Split texts into windows of this many tokens, separate sequences. By default 512.",
        minimum=1,
    )
    max_model_len: int | None = option(
        default=None,
        help=(
            "Longest sequence to plan for: layers with a sliding window cost less in longer "
            "sequences, and K offsets depend on it. By default the model's limit."
        ),
        minimum=1,
    )

    def check(self) -> None:
        """Check that there is exactly one budget, and that a window fits the context."""
        if (self.budget is None) == (self.max_loss is None):
            raise ConfigError(
                "give either budget (bytes per token) or max_loss (nats of KL divergence per "
                "token)."
            )
        _check_window(self.window, self.max_model_len)

    def max_bytes_per_token(self, bfloat16_bytes: float) -> float | None:
        """Return the budget in bytes per token, given those of a bfloat16 cache, or None."""
        percent = _percentage(self.budget)
        if percent is not None:
            return percent / 100 * bfloat16_bytes
        return None if self.budget is None else float(self.budget)


# -- bench -----------------------------------------------------------------------------------------


def _not_empty(name: str, value: Any, example: Sequence[str]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name}={value!r}: must be a list, such as {list(example)}.")
    return tuple(value)


def _bench_dtypes(value: Any) -> tuple[Any, ...]:
    found = _not_empty("kv_dtypes", value, ("bfloat16", "fp8_e4m3"))
    _check_names("kv_dtype", found, KV_DTYPES, "a path to a KVPlan")
    return found


def _bench_scales(value: Any) -> tuple[Any, ...]:
    found = _not_empty("kv_scales", value, ("auto", "token_head"))
    _check_names("kv_scales", found, KV_SCALES, "a KVScales", "a path to one")
    return found


@options
class BenchOptions(Options):
    """The requests of a benchmark and the caches that serve them."""

    kv_dtypes: Sequence[KVDtype] = option(
        default=("bfloat16", "fp8_e4m3"),
        help="Formats of the caches, each as `kv_dtype` of `LLM`.",
        convert=_bench_dtypes,
    )
    kv_scales: Sequence[KVScalesLike] = option(
        default=("auto",),
        help="Scales of the FP8 caches, each as `kv_scales` of `LLM`.",
        convert=_bench_scales,
    )
    requests: int = option(default=8, help="Number of concurrent requests.", minimum=1)
    prompt_tokens: int = option(default=128, help="Prompt tokens of each request.", minimum=1)
    output_tokens: int = option(default=64, help="Output tokens of each request.", minimum=1)
    rounds: int = option(default=3, help="Number of timed rounds. Medians are reported.", minimum=1)
    kv_cache_memory: int | str | None = option(
        default=None,
        help=(
            "Size of each cache in bytes. By default enough for all requests. With less, requests "
            "wait or are preempted, which shows the gain of a smaller format."
        ),
    )
    attention: AttentionName | None = option(
        default=None,
        help="Attention implementation. By default the fastest one that runs on this device.",
    )
