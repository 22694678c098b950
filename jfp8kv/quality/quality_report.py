"""`QualityReport`: the result of `compare`, as data, tables and a figure."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfp8kv.core.report import Report, empty_table, gap, plain
from jfp8kv.quality.cache_quality import CacheQuality, Magnitudes, ReconstructionError
from jfp8kv.quality.plots import comparison_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, repr=False)
class QualityReport(Report):
    """The result of `compare`. Prints as tables.

    `plot` draws a figure and `to_dict` returns everything. `report["fp8_e4m3 unit"]` is the cache
    with that label.

    Attributes:
      tokens, sequences: the number of scored tokens, and of windows with at least two tokens.
      window: the maximum length of a window.
      needle_lengths, needle_depths: those of the needle test, empty if it was skipped.
      caches: the quality of each cache, the float32 cache first.
      magnitudes: histograms of keys and values with the float32 cache.
    """

    tokens: int
    sequences: int
    window: int
    needle_lengths: tuple[int, ...]
    needle_depths: tuple[float, ...]
    caches: tuple[CacheQuality, ...]
    magnitudes: Magnitudes

    def __getitem__(self, label: str) -> CacheQuality:
        by_label = {cache.label: cache for cache in self.caches}
        if label not in by_label:
            raise KeyError(f"{label!r}: the labels are {', '.join(map(repr, by_label))}")
        return by_label[label]

    def plot(self) -> "Figure":
        """Return a matplotlib `Figure`: errors, magnitudes, quality against size, and recall.

        Raises `NotSupported` if matplotlib is not installed.
        """
        return comparison_figure(
            self.caches, self.magnitudes, self.needle_lengths, self.needle_depths
        )

    def by_layer(self) -> str:
        """Return a table of all layers for each cache, as text."""
        return plain(Group(*_layer_tables(self.caches[1:], None)))

    def __repr__(self) -> str:
        labels = ", ".join(cache.label for cache in self.caches)
        return f"QualityReport({labels}; {self.tokens:,} tokens)"

    def _layout(self, lines: box.Box | None) -> Group:
        count = f"{self.sequences:,} sequence{'s' if self.sequences > 1 else ''}"
        title = f"{self.tokens:,} tokens in {count} of up to {self.window:,}"
        return Group(
            Text(title, style="bold"),
            *gap(lines),
            _quality_table(self, lines),
            *gap(lines),
            _error_table(self.caches[1:], lines),
            *gap(lines),
            *_needle_table(self, lines),
            *_notes(self),
        )


# -- quality ---------------------------------------------------------------------------------------


def _quality_table(report: QualityReport, lines: box.Box | None) -> Table:
    needle = ["needle"] if report.needle_lengths else []
    table = empty_table(
        lines, "KV cache", "bytes/token", "perplexity", "change", "KL (nats)", "top-1", *needle
    )
    for number, cache in enumerate(report.caches):
        cells = ["", "0", ""]  # of the baseline
        if number:
            kl = _with_stderr(cache.kl, cache.kl_stderr)
            cells = [_perplexity_change(cache), kl, f"{cache.top1_agreement:.2%}"]
        if cache.mean_recall is not None:
            cells.append(f"{cache.mean_recall:.1%}")
        size = f"{cache.bytes_per_token:,.0f}"
        table.add_row(cache.label, size, f"{cache.perplexity:.3f}", *cells)
    return table


def _perplexity_change(cache: CacheQuality) -> str:
    """Return `+1.02% ± 0.31%`. To first order the error is that of the mean log-probability."""
    change = f"{cache.perplexity_change:+.2%}"
    if cache.nll_change_stderr is None:
        return change
    return f"{change} ± {(1 + cache.perplexity_change) * cache.nll_change_stderr:.2%}"


def _with_stderr(value: float, stderr: float | None) -> str:
    """Return `0.0123 ± 0.0004`: two digits of the error, or three digits of a value without one."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    finest = stderr / 10 if stderr else abs(value) / 100
    decimals = max(0, -math.floor(math.log10(finest)))
    shown = f"{value:.{decimals}f}"
    return shown if stderr is None else f"{shown} ± {stderr:.{decimals}f}"


def _notes(report: QualityReport) -> Iterator[Text]:
    stderr = (
        "± is a standard error over sequences."
        if report.sequences > 1
        else "A single sequence has no standard error."
    )
    yield Text(
        "change: of the perplexity. KL: divergence of this cache's predictions from the float32 "
        f"cache's, per token. {stderr} top-1: share of tokens after which both have the same most "
        "likely token."
    )
    if report.needle_lengths:
        yield Text(
            "needle: share of a hidden sequence that is recalled, over lengths and depths (0 is "
            "the beginning)."
        )


# -- reconstruction error --------------------------------------------------------------------------


def _error_table(caches: tuple[CacheQuality, ...], lines: box.Box | None) -> Table:
    table = empty_table(
        lines,
        "KV cache",
        "K SNR dB",
        "worst (layer)",
        "V SNR dB",
        "worst (layer)",
        "K, V clipped",
        "K, V flushed",
    )
    for cache in caches:
        table.add_row(
            cache.label,
            *_snr_cells(cache.k),
            *_snr_cells(cache.v),
            f"{_share(cache.k.clipped_share)}, {_share(cache.v.clipped_share)}",
            f"{_share(cache.k.flushed_share)}, {_share(cache.v.flushed_share)}",
        )
    return table


def _layer_tables(
    caches: tuple[CacheQuality, ...], lines: box.Box | None
) -> Iterator[RenderableType]:
    """Yield a table of all layers for each cache."""
    for cache in caches:
        table = empty_table(
            lines,
            "layer",
            "format",
            "K SNR dB",
            "V SNR dB",
            "K clipped",
            "V clipped",
            "K flushed",
            "V flushed",
            text=["format"],
        )
        for layer, name in enumerate(cache.layers):
            table.add_row(
                str(layer),
                name,
                _decibels(cache.k.snr_db[layer]),
                _decibels(cache.v.snr_db[layer]),
                _share(cache.k.clipped[layer]),
                _share(cache.v.clipped[layer]),
                _share(cache.k.flushed[layer]),
                _share(cache.v.flushed[layer]),
            )
        yield Text(cache.label, style="bold")
        yield table
        yield from gap(lines)


def _snr_cells(errors: ReconstructionError) -> tuple[str, str]:
    worst = errors.snr_db[errors.worst_layer]
    shown = "" if math.isinf(worst) else f"{_decibels(worst)} ({errors.worst_layer})"
    return _decibels(errors.mean_snr_db), shown


def _decibels(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f}"


def _share(share: float) -> str:
    if share == 0:
        return "0"
    return f"{share:.2%}" if share >= 5e-5 else f"{100 * share:.0e}%"


# -- needles ---------------------------------------------------------------------------------------


def _needle_table(report: QualityReport, lines: box.Box | None) -> Iterator[RenderableType]:
    if not report.needle_lengths:
        return
    depths = [f"{depth:g}" for depth in report.needle_depths]
    columns = []
    for length in report.needle_lengths:
        columns += [f"{length:,} at {depths[0]}", *depths[1:]]
    table = empty_table(lines, "needle recall", *columns)
    for cache in report.caches:
        recalls = [recall for row in cache.needle_recall for recall in row]
        table.add_row(cache.label, *(f"{recall:.0%}" for recall in recalls))
    yield table
    yield from gap(lines)
