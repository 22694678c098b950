"""The quality of one cache: sums over sequences, and the means and fractions of reports."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from jfp8kv.cache.config import CacheConfig
from jfp8kv.engine.buckets import default_prefill_chunk, max_tokens_per_dispatch
from jfp8kv.quality.cache_choices import CacheChoice
from jfp8kv.quality.metrics import TokenScores
from jfp8kv.quality.observers import LOWEST_OCTAVE, OCTAVES, HistogramObserver
from jfp8kv.quality.quantization_stats import CacheStats, QuantStats

ByLayer: TypeAlias = tuple[float, ...]
ByHead: TypeAlias = tuple[tuple[float, ...], ...]  # [layers][kv_heads]

BINS_PER_OCTAVE = 4  # of `Magnitudes`
_MAX_NATS = 700.0  # exp of more overflows a float


@dataclasses.dataclass(frozen=True)
class ReconstructionError:
    """The quantization error of the keys, or of the values, of one cache.

    Attributes:
      snr_db: signal-to-noise ratio in decibels, 10 log10 of the sum of squares over the sum of
        squared errors; infinite without error.
      clipped: fraction of values that are larger than the largest representable one.
      flushed: fraction of nonzero values that are stored as zero.
      limits: by layer, the smallest and the largest magnitude that can be stored, as medians over
        heads and channels; None with dynamic scales or K offsets.
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
        """Mean over the layers with a finite ratio; infinite if there are none."""
        lossy = [each for each in self.snr_db if each != math.inf]
        return sum(lossy) / len(lossy) if lossy else math.inf

    @property
    def worst_layer(self) -> int:
        """The layer with the lowest signal-to-noise ratio."""
        return min(range(len(self.snr_db)), key=lambda layer: self.snr_db[layer])

    @property
    def clipped_share(self) -> float:
        """Clipped fraction of the values of all layers."""
        return sum(self.clipped) / len(self.clipped)

    @property
    def flushed_share(self) -> float:
        """Flushed fraction of the values of all layers."""
        return sum(self.flushed) / len(self.flushed)


@dataclasses.dataclass(frozen=True)
class CacheQuality:
    """The quality of one cache, relative to the float32 cache, over all tokens with a predecessor.

    Standard errors are those of a mean over sequences, or None for a single sequence.

    Attributes:
      label, kv_dtype, kv_scales: names of the cache; `kv_scales` is "" for formats without scales.
      layers: the format of each layer, and whether its scales are dynamic.
      bytes_per_token: as in `llm.stats`.
      nll, perplexity: mean negative log-likelihood in nats, and its exponential.
      nll_change: the increase of `nll` over the float32 cache.
      kl, kl_largest: mean and largest KL(float32 cache || this cache) per token, in nats.
      top1_agreement: fraction of tokens after which both have the same most likely next token.
      needle_recall: recall by prompt length, then depth.
      k, v: reconstruction errors of keys and of values.
    """

    label: str
    kv_dtype: str
    kv_scales: str
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
        """The increase over the perplexity of the float32 cache: 0.01 is 1%."""
        return math.expm1(min(self.nll_change, _MAX_NATS))

    @property
    def mean_recall(self) -> float | None:
        """Mean over all needles; None if there were none."""
        recalls = [recall for row in self.needle_recall for recall in row]
        return sum(recalls) / len(recalls) if recalls else None


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """Histograms of the magnitudes of keys and values, by layer.

    Bin `i` starts at `2**(lowest + i / parts)`. The first bin also counts all
    smaller magnitudes (zeros), the last all larger ones.
    """

    lowest: int
    parts: int
    k: tuple[tuple[int, ...], ...]  # [layers][bins]
    v: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, histogram: HistogramObserver) -> "Magnitudes":
        """Return the histogram of granularity "tensor" with wider bins."""
        counts = histogram.counts[:, :, 0, 0]  # [layers, kinds, bins]
        wide = counts.reshape(*counts.shape[:2], OCTAVES * BINS_PER_OCTAVE, -1).sum(axis=-1)
        k, v = (tuple(map(tuple, wide[:, kind].tolist())) for kind in (0, 1))
        return cls(LOWEST_OCTAVE, BINS_PER_OCTAVE, k, v)


# -- sums ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SequenceTotals:
    """Sums over the predictions of one sequence."""

    count: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


class CacheTotals:
    """Sums over all sequences of one cache, in float64 and Python integers."""

    def __init__(self) -> None:
        self.sequences: list[SequenceTotals] = []
        self.tokens = 0  # tokens whose keys and values were stored
        # The fields of `QuantStats`, each [layers, kinds, kv_heads].
        self.quantization: dict[str, np.ndarray] = {}
        self.magnitudes: HistogramObserver | None = None
        self.kl_largest = 0.0
        self.recall: list[float] = []  # of each needle

    def start_sequence(self) -> None:
        """Start a new sequence, to which `add` adds."""
        self.sequences.append(SequenceTotals())

    def add(self, scores: TokenScores, stats: CacheStats, predicted: int, tokens: int) -> None:
        """Add a chunk of `tokens` tokens. The first `predicted` of them have a next token."""
        sequence = self.sequences[-1]
        sequence.count += predicted
        sequence.nll += float(np.sum(scores.nll[:predicted], dtype=np.float64))
        sequence.kl += float(np.sum(scores.kl[:predicted], dtype=np.float64))
        sequence.agreed += int(np.sum(scores.agrees[:predicted]))
        self.kl_largest = float(np.max(scores.kl[:predicted], initial=self.kl_largest))
        self.tokens += tokens
        self._add_quantization(stats.quantization)
        if stats.magnitudes is not None:
            new = stats.magnitudes.to_host()
            self.magnitudes = new if self.magnitudes is None else self.magnitudes.merge(new)

    def _add_quantization(self, new: QuantStats) -> None:
        for field in dataclasses.fields(new):
            values = np.asarray(getattr(new, field.name), np.float64)
            self.quantization[field.name] = self.quantization.get(field.name, 0.0) + values


# -- means -----------------------------------------------------------------------------------------


def summarize(
    choice: CacheChoice,
    config: CacheConfig,
    totals: CacheTotals,
    baseline: CacheTotals,
    *,
    depths: int,
    max_model_len: int,
) -> CacheQuality:
    """Return the quality of one cache.

    Args:
      choice, config: the cache.
      totals: its sums.
      baseline: the sums of the float32 cache.
      depths: the number of needles per prompt length.
      max_model_len: bytes per token are those of an engine for sequences of this length.
    """
    nll, _ = mean_and_stderr(totals.sequences, lambda sequence: sequence.nll)
    changes = [
        dataclasses.replace(each, nll=each.nll - base.nll)
        for each, base in zip(totals.sequences, baseline.sequences, strict=True)
    ]
    nll_change, nll_change_stderr = mean_and_stderr(changes, lambda sequence: sequence.nll)
    kl, kl_stderr = mean_and_stderr(totals.sequences, lambda sequence: sequence.kl)
    agreement, _ = mean_and_stderr(totals.sequences, lambda sequence: sequence.agreed)
    starts = range(0, len(totals.recall), depths) if depths else range(0)
    span = max_tokens_per_dispatch(default_prefill_chunk())
    served = dataclasses.replace(config, max_tokens_per_dispatch=span)
    return CacheQuality(
        label=choice.label,
        kv_dtype=choice.dtype_label,
        kv_scales=choice.scales_label,
        layers=tuple(map(str, config.specs)),
        bytes_per_token=float(served.bytes_per_token(max_model_len)),
        nll=nll,
        perplexity=_exp(nll),
        nll_change=nll_change,
        nll_change_stderr=nll_change_stderr,
        kl=kl,
        kl_stderr=kl_stderr,
        kl_largest=totals.kl_largest,
        top1_agreement=agreement,
        needle_recall=tuple(tuple(totals.recall[i : i + depths]) for i in starts),
        k=_reconstruction_error(config, totals, 0),
        v=_reconstruction_error(config, totals, 1),
    )


def mean_and_stderr(
    sequences: Sequence[SequenceTotals], value: Callable[[SequenceTotals], float]
) -> tuple[float, float | None]:
    """Return the mean per token of a sum over tokens, and its standard error or None.

    Tokens of a sequence are not independent, so the sample consists of m sequences. They differ in
    length. With sums s_i, token counts n_i and r = sum s / sum n, the standard error of the ratio r
    is sqrt(m / (m - 1) sum (s_i - r n_i)^2) / sum n, which for equal lengths is that of a mean
    (Cochran, Sampling Techniques, third edition, section 6.4).
    """
    sums = np.array([value(sequence) for sequence in sequences], np.float64)
    counts = np.array([sequence.count for sequence in sequences], np.float64)
    mean = sums.sum() / counts.sum()
    if len(sequences) < 2:
        return float(mean), None
    spread = np.sum((sums - mean * counts) ** 2) * len(sequences) / (len(sequences) - 1)
    return float(mean), float(np.sqrt(spread) / counts.sum())


def decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return 10 log10(signal / noise); infinite without noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise == 0, np.inf, 10 * np.log10(signal / noise))


def _exp(x: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _reconstruction_error(
    config: CacheConfig, totals: CacheTotals, kind: int
) -> ReconstructionError:
    sums = {name: values[:, kind] for name, values in totals.quantization.items()}
    signal, noise = sums["signal"], sums["noise"]  # [layers, kv_heads]
    values_per_head = totals.tokens * config.config.head_dim
    clipped = sums["clipped"] / values_per_head
    flushed = sums["flushed"] / values_per_head
    return ReconstructionError(
        snr_db=tuple(decibels(signal.sum(axis=1), noise.sum(axis=1)).tolist()),
        clipped=tuple((sums["clipped"].mean(axis=1) / values_per_head).tolist()),
        flushed=tuple((sums["flushed"].mean(axis=1) / values_per_head).tolist()),
        snr_db_by_head=_by_head(decibels(signal, noise)),
        clipped_by_head=_by_head(clipped),
        flushed_by_head=_by_head(flushed),
        limits=_limits(config, kind),
    )


def _by_head(values: np.ndarray) -> ByHead:
    return tuple(map(tuple, values.tolist()))


def _limits(config: CacheConfig, kind: int) -> tuple[tuple[float, float] | None, ...]:
    scales = config.scales
    if scales is None or (kind == 0 and scales.k_offset is not None):
        return (None,) * len(config.specs)
    per_layer = (scales.v if kind else scales.k).astype(np.float64)
    medians = np.median(per_layer, axis=(1, 2)).tolist()
    return tuple(
        None if spec.dynamic else (spec.fmt.smallest_subnormal * scale, spec.fmt.largest * scale)
        for spec, scale in zip(config.specs, medians, strict=True)
    )
