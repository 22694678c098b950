"""A comparison as data: what each cache costs in bytes and in quality, by layer and head and in all."""

import dataclasses
import math
from typing import Any

ByLayer = tuple[float, ...]
ByHead = tuple[tuple[float, ...], ...]  # [layers][kv_heads]
_MOST_NATS = 700.0  # whose exponential a float still holds


@dataclasses.dataclass(frozen=True)
class ReconstructionError:
    """How well a cache kept the keys, or the values, it was given.

    `snr_db` is 10 log10 of the sum of squares over the sum of squared errors, in decibels; infinite where nothing was lost.
    `clipped` is the share of values stored as the largest there is although they are larger, `flushed` of those stored as zero
    although they are not. `limits`, by layer, is the smallest and the largest magnitude that can be stored (the median over
    heads and channels); None where each token brings a scale of its own, or where keys are stored less an offset.
    """

    snr_db: ByLayer
    clipped: ByLayer
    flushed: ByLayer
    snr_db_by_head: ByHead
    clipped_by_head: ByHead
    flushed_by_head: ByHead
    limits: tuple[tuple[float, float] | None, ...]

    @property
    def mean_snr_db(self) -> float:
        """Over the layers that lost something; infinite if none did."""
        lossy = [each for each in self.snr_db if each != math.inf]
        return sum(lossy) / len(lossy) if lossy else math.inf

    @property
    def worst_layer(self) -> int:
        """The layer that lost most."""
        return min(range(len(self.snr_db)), key=lambda layer: self.snr_db[layer])

    @property
    def clipped_share(self) -> float:
        """Of all layers' values."""
        return sum(self.clipped) / len(self.clipped)

    @property
    def flushed_share(self) -> float:
        """Of all layers' values."""
        return sum(self.flushed) / len(self.flushed)


@dataclasses.dataclass(frozen=True)
class CacheQuality:
    """One cache against the float32 one, over every token that has one before it.

    `layers` says what each layer keeps: its format, and whether scales are found for each token and head.
    `nll` is the mean negative log-likelihood in nats, `perplexity` its exponential, `nll_change` its difference to the float32
    cache's. `kl` is the mean divergence KL(float32 cache || this one) in nats, `kl_largest` the largest of one token,
    `top1_agreement` the share of tokens after which both find the same token likeliest. MSEObserver (`_stderr`) are standard errors
    of the mean over pieces of text; None for a single piece. `needle_recall` is by length, then depth; `bytes_per_token` as in
    `llm.stats`.
    """

    label: str
    kv_dtype: str
    kv_scales: str  # "" where there are none
    layers: tuple[str, ...]
    bytes_per_token: float
    nll: float
    perplexity: float
    nll_change: float
    nll_change_stderr: float | None
    kl: float
    kl_stderr: float | None
    kl_largest: float
    top1_agreement: float
    needle_recall: tuple[tuple[float, ...], ...]
    k: ReconstructionError
    v: ReconstructionError

    @property
    def perplexity_change(self) -> float:
        """The share by which it is above the float32 cache's: 0.01 is 1%."""
        return math.expm1(min(self.nll_change, _MOST_NATS))

    @property
    def mean_recall(self) -> float | None:
        """Over all needles; None if there were none."""
        every = [recall for row in self.needle_recall for recall in row]
        return sum(every) / len(every) if every else None


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """How many keys and values of each layer have which magnitude: bin `i` is from `2**(lowest + i / parts)` to the next; the
    first has all below too (zeros), the last all above."""

    lowest: int
    parts: int
    k: tuple[tuple[int, ...], ...]  # [layers][bins]
    v: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, repr=False)
class QualityReport:
    """Caches side by side, the float32 one first. Prints as tables; `plot` draws it, `to_dict` has everything.

    `report["fp8_e4m3 unit"]` is the cache of that label.
    """

    tokens: int
    pieces: int
    window: int
    needle_lengths: tuple[int, ...]
    needle_depths: tuple[float, ...]
    choices: tuple[CacheQuality, ...]
    magnitudes: Magnitudes  # of what the model gives its cache, as the float32 one saw it

    def __getitem__(self, label: str) -> CacheQuality:
        found = {choice.label: choice for choice in self.choices}
        if label not in found:
            raise KeyError(f"{label!r}: there are {', '.join(map(repr, found))}")
        return found[label]

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, of types that JSON has: None stands for what is infinite or no number."""
        return _plain(self)

    def plot(self) -> Any:
        """A matplotlib `Figure`: error by layer and head, magnitudes against what formats hold, quality against bytes, recall.

        Raises `NotSupported` where matplotlib is not installed.
        """
        from jfp8kv.quality.plots import figure

        return figure(self)

    def by_layer(self) -> str:
        """What each layer keeps, signal-to-noise ratios, and shares clipped and flushed, as tables in text."""
        from jfp8kv.core.report import plain
        from jfp8kv.quality.quality_tables import layers

        return plain(layers(self, lines=None))

    def __repr__(self) -> str:
        return f"QualityReport({', '.join(choice.label for choice in self.choices)}; {self.tokens:,} tokens)"

    def __str__(self) -> str:
        from jfp8kv.core.report import plain
        from jfp8kv.quality.quality_tables import layout

        return plain(layout(self, lines=None))

    def __rich__(self) -> Any:
        from jfp8kv.quality.quality_tables import layout

        return layout(self)

    def _repr_html_(self) -> str:
        from jfp8kv.core.report import as_html
        from jfp8kv.quality.quality_tables import layout

        return as_html(layout(self))


def _plain(x: Any) -> Any:
    if dataclasses.is_dataclass(x):
        fields = [field.name for field in dataclasses.fields(x)]
        derived = [name for name, value in vars(type(x)).items() if isinstance(value, property)]
        return {name: _plain(getattr(x, name)) for name in (*fields, *derived)}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
