"""A comparison as a picture: error by layer and head, magnitudes against what formats hold, quality against bytes, recall."""

import dataclasses
from typing import Any

import numpy as np

from jfp8kv.core.errors import NotSupported
from jfp8kv.quality.quality_report import CacheQuality, QualityReport, ReconstructionError

SIZE_INCHES = (16.0, 9.5)
COLOURS, MARKERS, DASHES = 10, "osD^vP*X<", ("solid", (0, (5, 2)), (0, (1, 1.2)))
LEGEND_COLUMNS, LONGEST_LABEL = 6, 28
NAMES = {"k": "Keys", "v": "Values"}


@dataclasses.dataclass(frozen=True)
class Look:
    """How one cache is drawn in every panel."""

    choice: CacheQuality
    colour: str
    marker: str
    dashes: Any

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.dashes, "linewidth": 1.4}


def figure(found: QualityReport) -> Any:
    """Six panels under one legend; see `QualityReport.plot`."""
    plt = _pyplot()
    shown = plt.figure(figsize=SIZE_INCHES, layout="constrained")
    panels = shown.subplots(2, 3)
    looks = [
        Look(choice, f"C{i % COLOURS}", MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, choice in enumerate(found.choices[1:])
    ]
    for row, kind in enumerate("kv"):
        _errors(panels[row, 0], looks, kind)
        _magnitudes(panels[row, 1], found, looks, kind)
    _quality(panels[0, 2], looks)
    _recall(panels[1, 2], found, looks)
    handles = [
        plt.Line2D([], [], **look.line, marker=look.marker, label=look.choice.label)
        for look in looks
    ]
    if handles:
        shown.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(LEGEND_COLUMNS, len(handles)),
            handlelength=3,
        )
    plt.close(shown)  # a notebook shows what a cell gives; open, it would be shown twice
    return shown


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise NotSupported(
            "plots need matplotlib, which is not installed: pip install 'jfp8kv[notebooks]'."
        ) from error
    return plt


def _errors(panel: Any, looks: list[Look], kind: str) -> None:
    """Signal to noise by layer, a line for each cache, and a dot for each head."""
    panel.set(
        title=f"{NAMES[kind]}: what the cache keeps (dots: heads)",
        xlabel="layer",
        ylabel="signal to noise, dB",
    )
    for look in looks:
        kept: ReconstructionError = getattr(look.choice, kind)
        panel.plot(range(len(kept.snr_db)), _finite(kept.snr_db), **look.line)
        heads = np.array(kept.snr_db_by_head, np.float64)
        at = np.repeat(np.arange(len(heads)), heads.shape[1])
        panel.scatter(at, _finite(heads.ravel()), color=look.colour, s=5, alpha=0.45, linewidths=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


def _finite(values: Any) -> np.ndarray:
    """What is infinite is left out of a picture."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _magnitudes(panel: Any, found: QualityReport, looks: list[Look], kind: str) -> None:
    """Where the magnitudes of each layer lie, dark for many, and the least and largest that each FP8 cache can hold there."""
    seen = found.magnitudes
    counts = np.array(getattr(seen, kind), np.float64)
    share = counts / counts.sum(axis=1, keepdims=True)
    layers, bins = counts.shape
    low, high = seen.lowest, seen.lowest + bins / seen.parts
    extent = (low, high, -0.5, layers - 0.5)
    panel.imshow(
        np.sqrt(share),
        aspect="auto",
        origin="lower",
        cmap="Greys",
        interpolation="nearest",
        extent=extent,
    )
    for look in looks:
        limits = [each or (np.nan, np.nan) for each in getattr(look.choice, kind).limits]
        for edge in np.log2(limits).T:
            edge = np.where((low - 2 < edge) & (edge < high), edge, np.nan)
            panel.step([*edge, edge[-1]], np.arange(layers + 1) - 0.5, **look.line)
    panel.set(
        title=f"{NAMES[kind]}: how large (grey), and the range a cache has",
        xlabel="log2 of magnitude",
        ylabel="layer",
    )
    panel.set_xlim(low - 2, high)
    panel.yaxis.get_major_locator().set_params(integer=True)


def _quality(panel: Any, looks: list[Look]) -> None:
    """KL against bytes per token, with its standard error."""
    panel.set(
        title="Quality against size",
        xlabel="cache, bytes per token",
        ylabel="KL from the float32 cache, nats per token",
    )
    lossy = [look for look in looks if look.choice.kl > 0]
    for look in lossy:
        at, error = look.choice.kl, look.choice.kl_stderr or 0.0
        panel.errorbar(
            look.choice.bytes_per_token,
            at,
            yerr=[[min(error, 0.9 * at)], [error]],
            color=look.colour,
            marker=look.marker,
            capsize=3,
            alpha=0.8,
        )
    if lossy:
        panel.set_yscale("log")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3, which="both")


def _recall(panel: Any, found: QualityReport, looks: list[Look]) -> None:
    """Recall by cache, length and depth, in numbers on their colours."""
    panel.set_title("Needle in a haystack: recall, %")
    if not found.needle_lengths:
        panel.set_axis_off()
        return
    table = np.array(
        [[recall for row in choice.needle_recall for recall in row] for choice in found.choices]
    )
    panel.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1.3)
    for (row, column), recall in np.ndenumerate(table):
        panel.text(column, row, f"{100 * recall:.0f}", ha="center", va="center", fontsize=8)
    depths = found.needle_depths
    panel.set_xticks(
        range(table.shape[1]),
        [f"{depth:g}" for depth in depths] * len(found.needle_lengths),
        fontsize=8,
    )
    panel.set_yticks(
        range(len(found.choices)), [_short(choice.label) for choice in found.choices], fontsize=8
    )
    for label, look in zip(panel.get_yticklabels()[1:], looks, strict=True):
        label.set_color(look.colour)
    panel.set_xlabel(
        "depth, in texts of "
        + ", ".join(f"{length:,}" for length in found.needle_lengths)
        + " tokens"
    )
    for i in range(1, len(found.needle_lengths)):
        panel.axvline(i * len(depths) - 0.5, color="white", linewidth=3)


def _short(label: str) -> str:
    """Without its middle where it is long: both ends tell caches apart."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[: half - 1]}…{label[1 - half :]}"
