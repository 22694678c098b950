"""A comparison as a picture: error by layer and head, magnitudes against what formats hold, quality against bytes, recall."""

from typing import Any

import numpy as np

from jfp8kv.comparison.report import Comparison, Kept
from jfp8kv.core.errors import NotSupported

SIZE_INCHES = (15.0, 9.0)
MARKERS = "osD^vP*X<>"


def figure(found: Comparison) -> Any:
    """Six panels under one legend; see `Comparison.plot`."""
    plt = _pyplot()
    shown = plt.figure(figsize=SIZE_INCHES, layout="constrained")
    panels = shown.subplots(2, 3)
    colours = {choice.label: f"C{i % 10}" for i, choice in enumerate(found.choices[1:])}
    for row, kind in enumerate("kv"):
        _errors(panels[row, 0], found, kind, colours)
        _magnitudes(panels[row, 1], found, kind, colours)
    _quality(panels[0, 2], found, colours)
    _recall(panels[1, 2], found)
    handles = [
        plt.Line2D([], [], color=colour, marker=_marker(i), label=label) for i, (label, colour) in enumerate(colours.items())
    ]
    shown.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    plt.close(shown)  # a notebook shows what a cell gives; open, it would be shown twice
    return shown


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise NotSupported("plots need matplotlib, which is not installed: pip install 'jfp8kv[notebooks]'.") from error
    return plt


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _errors(panel: Any, found: Comparison, kind: str, colours: dict[str, str]) -> None:
    """Signal to noise by layer, a line for each cache, and a dot for each head."""
    panel.set(title=f"{_NAMES[kind]}: what the cache keeps", xlabel="layer", ylabel="signal to noise, dB")
    for choice in found.choices[1:]:
        kept: Kept = getattr(choice, kind)
        layers = range(len(kept.snr_db))
        panel.plot(layers, _finite(kept.snr_db), color=colours[choice.label], linewidth=1.4)
        heads = np.array(kept.snr_db_by_head, np.float64)
        at = np.repeat(np.arange(len(heads)), heads.shape[1])
        panel.scatter(at, _finite(heads.ravel()), color=colours[choice.label], s=5, alpha=0.45, linewidths=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


_NAMES = {"k": "Keys", "v": "Values"}


def _finite(values: Any) -> np.ndarray:
    """What is infinite is left out of a picture."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _magnitudes(panel: Any, found: Comparison, kind: str, colours: dict[str, str]) -> None:
    """Where the magnitudes of each layer lie, dark for many, and the least and largest that each FP8 cache can hold there."""
    seen = found.magnitudes
    counts = np.array(getattr(seen, kind), np.float64)
    share = counts / counts.sum(axis=1, keepdims=True)
    layers, bins = counts.shape
    low, high = seen.lowest, seen.lowest + bins / seen.parts
    panel.imshow(
        np.sqrt(share),
        aspect="auto",
        origin="lower",
        cmap="Greys",
        interpolation="nearest",
        extent=(low, high, -0.5, layers - 0.5),
    )
    for choice in found.choices[1:]:
        limits = [each or (np.nan, np.nan) for each in getattr(choice, kind).limits]
        for edge in np.log2(limits).T:
            if np.any((low - 2 < edge) & (edge < high)):
                panel.step([*edge, edge[-1]], np.arange(layers + 1) - 0.5, color=colours[choice.label], linewidth=1.2)
    panel.set(title=f"{_NAMES[kind]}: magnitudes and what is held", xlabel="log2 of the magnitude", ylabel="layer")
    panel.set_xlim(low - 2, high)


def _quality(panel: Any, found: Comparison, colours: dict[str, str]) -> None:
    """KL against bytes per token, with its standard error."""
    panel.set(title="Quality against size", xlabel="cache, bytes per token", ylabel="KL from the float32 cache, nats per token")
    for i, choice in enumerate(found.choices[1:]):
        if choice.kl > 0:
            error = [[min(choice.kl_stderr or 0.0, 0.9 * choice.kl)], [choice.kl_stderr or 0.0]]
            panel.errorbar(
                choice.bytes_per_token,
                choice.kl,
                yerr=error,
                color=colours[choice.label],
                marker=_marker(i),
                capsize=3,
                alpha=0.85,
            )
    if any(choice.kl > 0 for choice in found.choices):
        panel.set_yscale("log")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3, which="both")


def _recall(panel: Any, found: Comparison) -> None:
    """Recall by cache, length and depth, in numbers on their colours."""
    panel.set_title("Needle in a haystack: recall, %")
    if not found.needle_lengths:
        panel.set_axis_off()
        return
    table = np.array([[recall for row in choice.needle_recall for recall in row] for choice in found.choices])
    panel.imshow(table, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
    for (row, column), recall in np.ndenumerate(table):
        panel.text(column, row, f"{100 * recall:.0f}", ha="center", va="center", fontsize=7)
    depths = found.needle_depths
    panel.set_xticks(range(table.shape[1]), [f"{depth:g}" for depth in depths] * len(found.needle_lengths), fontsize=8)
    panel.set_yticks(range(len(found.choices)), [choice.label for choice in found.choices], fontsize=8)
    panel.set_xlabel("depth, in texts of " + ", ".join(f"{length:,}" for length in found.needle_lengths) + " tokens")
    for i in range(1, len(found.needle_lengths)):
        panel.axvline(i * len(depths) - 0.5, color="white", linewidth=3)
