"""The figure of `QualityReport`: errors, magnitudes, quality against size, recall."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jfp8kv.core.errors import NotSupported
from jfp8kv.quality.cache_quality import CacheQuality, Magnitudes, ReconstructionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (16.0, 9.5)
COLORS = 10
MARKERS = "osD^vP*X<"
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.2)))
LEGEND_COLUMNS = 6
MAX_LABEL = 28

Kind = Literal["k", "v"]
KINDS: tuple[Kind, ...] = ("k", "v")
NAMES = {"k": "Keys", "v": "Values"}


@dataclasses.dataclass(frozen=True)
class CacheStyle:
    """The style of one cache in all panels."""

    cache: CacheQuality
    color: str
    marker: str
    dashes: Any

    @property
    def line(self) -> dict[str, Any]:
        """Keywords of a matplotlib line."""
        return {"color": self.color, "linestyle": self.dashes, "linewidth": 1.4}

    def errors(self, kind: Kind) -> ReconstructionError:
        """Return the errors of keys or of values."""
        return self.cache.k if kind == "k" else self.cache.v


def comparison_figure(
    caches: Sequence[CacheQuality],
    magnitudes: Magnitudes,
    needle_lengths: Sequence[int],
    needle_depths: Sequence[float],
) -> "Figure":
    """Return a figure of six panels with one legend. The first cache is the baseline.

    Raises `NotSupported` if matplotlib is not installed.
    """
    plt = _pyplot()
    figure: Figure = plt.figure(figsize=SIZE_INCHES, layout="constrained")
    panels = figure.subplots(2, 3)
    styles = [
        CacheStyle(cache, f"C{i % COLORS}", MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, cache in enumerate(caches[1:])
    ]
    for row, kind in enumerate(KINDS):
        _plot_errors(panels[row, 0], styles, kind)
        _plot_magnitudes(panels[row, 1], magnitudes, styles, kind)
    _plot_quality(panels[0, 2], styles)
    _plot_recall(panels[1, 2], caches, styles, needle_lengths, needle_depths)
    handles = [
        plt.Line2D([], [], **style.line, marker=style.marker, label=style.cache.label)
        for style in styles
    ]
    if handles:
        columns = min(LEGEND_COLUMNS, len(handles))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=3)
    plt.close(figure)  # a notebook shows the returned figure; an open one would be shown twice
    return figure


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise NotSupported(
            "plots need matplotlib, which is not installed: pip install 'jfp8kv[notebooks]'."
        ) from error
    return plt


def _plot_errors(panel: "Axes", styles: Sequence[CacheStyle], kind: Kind) -> None:
    """Plot the signal-to-noise ratio by layer: a line for each cache, a dot for each head."""
    panel.set(
        title=f"{NAMES[kind]}: reconstruction (dots: heads)",
        xlabel="layer",
        ylabel="signal to noise, dB",
    )
    for style in styles:
        errors = style.errors(kind)
        panel.plot(range(len(errors.snr_db)), _finite(errors.snr_db), **style.line)
        heads = np.array(errors.snr_db_by_head, np.float64)
        layers = np.repeat(np.arange(len(heads)), heads.shape[1])
        panel.scatter(
            layers, _finite(heads.ravel()), color=style.color, s=5, alpha=0.45, linewidths=0
        )
    _integer_ticks(panel.xaxis)
    panel.grid(alpha=0.3)


def _finite(values: Any) -> np.ndarray:
    """Return the values with infinities replaced by NaN, which matplotlib skips."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _integer_ticks(axis: Any) -> None:
    axis.get_major_locator().set_params(integer=True)


def _plot_magnitudes(
    panel: "Axes", magnitudes: Magnitudes, styles: Sequence[CacheStyle], kind: Kind
) -> None:
    """Plot a histogram of magnitudes for each layer, and the range that each FP8 cache stores."""
    counts = np.array(magnitudes.k if kind == "k" else magnitudes.v, np.float64)
    share = counts / counts.sum(axis=1, keepdims=True)
    layers, bins = counts.shape
    low = magnitudes.lowest
    high = magnitudes.lowest + bins / magnitudes.parts
    panel.imshow(
        np.sqrt(share),
        aspect="auto",
        origin="lower",
        cmap="Greys",
        interpolation="nearest",
        extent=(low, high, -0.5, layers - 0.5),
    )
    for style in styles:
        limits = [each or (np.nan, np.nan) for each in style.errors(kind).limits]
        for edge in np.log2(limits).T:
            edge = np.where((low - 2 < edge) & (edge < high), edge, np.nan)
            panel.step([*edge, edge[-1]], np.arange(layers + 1) - 0.5, **style.line)
    panel.set(
        title=f"{NAMES[kind]}: magnitudes (grey) and range of the cache",
        xlabel="log2 of magnitude",
        ylabel="layer",
    )
    panel.set_xlim(low - 2, high)
    _integer_ticks(panel.yaxis)


def _plot_quality(panel: "Axes", styles: Sequence[CacheStyle]) -> None:
    """Plot the KL divergence, with its standard error, against bytes per token."""
    panel.set(
        title="Quality against size",
        xlabel="cache, bytes per token",
        ylabel="KL from the float32 cache, nats per token",
    )
    lossy = [style for style in styles if style.cache.kl > 0]
    for style in lossy:
        kl = style.cache.kl
        stderr = style.cache.kl_stderr or 0.0
        panel.errorbar(
            style.cache.bytes_per_token,
            kl,
            yerr=[[min(stderr, 0.9 * kl)], [stderr]],
            color=style.color,
            marker=style.marker,
            capsize=3,
            alpha=0.8,
        )
    if lossy:
        panel.set_yscale("log")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3, which="both")


def _plot_recall(
    panel: "Axes",
    caches: Sequence[CacheQuality],
    styles: Sequence[CacheStyle],
    lengths: Sequence[int],
    depths: Sequence[float],
) -> None:
    """Plot recall by cache, length and depth as a heat map with numbers."""
    panel.set_title("Needle in a haystack: recall, %")
    if not lengths:
        panel.set_axis_off()
        return
    table = np.array(
        [[recall for row in cache.needle_recall for recall in row] for cache in caches]
    )
    panel.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1.3)
    for (row, column), recall in np.ndenumerate(table):
        panel.text(column, row, f"{100 * recall:.0f}", ha="center", va="center", fontsize=8)
    depth_labels = [f"{depth:g}" for depth in depths] * len(lengths)
    panel.set_xticks(range(table.shape[1]), depth_labels, fontsize=8)
    panel.set_yticks(range(len(caches)), [_shorten(cache.label) for cache in caches], fontsize=8)
    for label, style in zip(panel.get_yticklabels()[1:], styles, strict=True):
        label.set_color(style.color)
    shown = ", ".join(f"{length:,}" for length in lengths)
    panel.set_xlabel(f"depth, in prompts of {shown} tokens")
    for i in range(1, len(lengths)):
        panel.axvline(i * len(depths) - 0.5, color="white", linewidth=3)


def _shorten(label: str) -> str:
    """Return a long label without its middle, because both ends distinguish caches."""
    half = MAX_LABEL // 2
    return label if len(label) <= MAX_LABEL else f"{label[: half - 1]}…{label[1 - half :]}"
