"""A comparison in words: tables for a terminal, and the same without lines or colours for everything else."""

import math
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfp8kv.core.report import LINES, empty_table
from jfp8kv.quality.quality_report import CacheQuality, QualityReport, ReconstructionError


def layout(found: QualityReport, lines: box.Box | None = LINES) -> Group:
    """The tables of a comparison; `lines` is what is drawn between their parts."""
    pieces = f"{found.pieces:,} piece{'s' if found.pieces > 1 else ''} of up to {found.window:,}"
    title = Text(f"{found.tokens:,} tokens in {pieces}", style="bold")
    gap = [] if lines else [""]  # lines come with empty rows around them
    tables = [_quality(found, lines), *gap, _kept(found, lines), *gap, *_needles(found, lines)]
    return Group(title, *gap, *tables, *_notes(found))


def layers(found: QualityReport, lines: box.Box | None = LINES) -> Group:
    """Tables of what each cache keeps in each layer, the float32 one left out."""
    tables: list[RenderableType] = []
    columns = (
        "layer",
        "keeps",
        "K SNR dB",
        "V SNR dB",
        "K clipped",
        "V clipped",
        "K flushed",
        "V flushed",
    )
    for choice in found.choices[1:]:
        table = empty_table(lines, *columns, text=["keeps"])
        for layer in range(len(choice.k.snr_db)):
            each = (choice.k, choice.v)
            shares = (
                _percent(getattr(kept, name)[layer])
                for name in ("clipped", "flushed")
                for kept in each
            )
            table.add_row(
                str(layer),
                choice.layers[layer],
                *(_decibels(kept.snr_db[layer]) for kept in each),
                *shares,
            )
        tables += [Text(choice.label, style="bold"), table, *([] if lines else [""])]
    return Group(*tables)


# -- quality ------------------------------------------------------------------------------------------------------------


def _quality(found: QualityReport, lines: box.Box | None) -> Table:
    needle = ["needle"] if found.needle_lengths else []
    table = empty_table(
        lines, "KV cache", "bytes/token", "perplexity", "change", "KL (nats)", "top-1", *needle
    )
    base = found.choices[0]
    for choice in found.choices:
        first = choice is base
        table.add_row(
            choice.label,
            f"{choice.bytes_per_token:,.0f}",
            f"{choice.perplexity:.3f}",
            "" if first else _change(choice),
            "0" if first else _with_error(choice.kl, choice.kl_stderr),
            "" if first else f"{choice.top1_agreement:.2%}",
            *([] if choice.mean_recall is None else [f"{choice.mean_recall:.1%}"]),
        )
    return table


def _change(choice: CacheQuality) -> str:
    """`+1.02% ± 0.31%` of perplexity; to first order its error is that of the mean log-probability."""
    error = choice.nll_change_stderr
    return f"{choice.perplexity_change:+.2%}" + (
        "" if error is None else f" ± {(1 + choice.perplexity_change) * error:.2%}"
    )


def _with_error(value: float, error: float | None) -> str:
    """`0.0123 ± 0.0004`: as many decimals as two digits of the error, or three of the value, need."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    finest = error / 10 if error else abs(value) / 100
    decimals = max(0, -math.floor(math.log10(finest)))
    return f"{value:.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")


def _notes(found: QualityReport) -> Iterator[Text]:
    error = (
        "± is a standard error over pieces."
        if found.pieces > 1
        else "One piece alone gives no standard error."
    )
    yield Text(
        f"change: of perplexity. KL is from the float32 cache's predictions to this one's, by token. {error} top-1: the share "
        "of tokens after which both have the same likeliest one."
    )
    if found.needle_lengths:
        yield Text(
            "needle: the share of a hidden sequence that is recalled, over lengths and depths (0 is the beginning)."
        )


# -- keys and values ----------------------------------------------------------------------------------------------------


def _kept(found: QualityReport, lines: box.Box | None) -> Table:
    snr = ("K SNR dB", "least (layer)", "V SNR dB", "least (layer)")
    table = empty_table(lines, "KV cache", *snr, "K, V clipped", "K, V flushed")
    for choice in found.choices[1:]:
        table.add_row(
            choice.label,
            *_snr(choice.k),
            *_snr(choice.v),
            _shares(choice, "clipped"),
            _shares(choice, "flushed"),
        )
    return table


def _snr(kept: ReconstructionError) -> tuple[str, str]:
    least = kept.snr_db[kept.worst_layer]
    exact = math.isinf(least)
    return _decibels(kept.mean_snr_db), "" if exact else f"{_decibels(least)} ({kept.worst_layer})"


def _shares(choice: CacheQuality, name: str) -> str:
    return ", ".join(_percent(getattr(kept, f"{name}_share")) for kept in (choice.k, choice.v))


def _decibels(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f}"


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.2%}" if share >= 5e-5 else f"{100 * share:.0e}%"


# -- needles ------------------------------------------------------------------------------------------------------------


def _needles(found: QualityReport, lines: box.Box | None) -> Iterator[RenderableType]:
    if not found.needle_lengths:
        return
    depths = [f"{depth:g}" for depth in found.needle_depths]
    columns = [
        f"{length:,} at {depth}" if depth == depths[0] else depth
        for length in found.needle_lengths
        for depth in depths
    ]
    table = empty_table(lines, "needle recall", *columns)
    for choice in found.choices:
        table.add_row(
            choice.label, *(f"{recall:.0%}" for row in choice.needle_recall for recall in row)
        )
    yield table
    if not lines:
        yield ""
