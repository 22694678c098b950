"""The KV scales of a model by layer: values, sources, and whether an FP8 cache uses them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.text import Text

from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.kv_scale_tensors import GRANULARITIES, StoredScale
from jfp8kv.checkpoint.kv_scales import IGNORED, LayerScales, ScaleIssue, ScaleReport
from jfp8kv.core.report import empty_table, gap

IN_MEMORY = "Params.kv_scales"
STRICT_NOTE = (
    "Strict loading refuses these scales; with strict=False (--no-strict) the fallbacks apply."
)

Range: TypeAlias = tuple[float, float]
"""The smallest and the largest value over heads and channels."""


@dataclasses.dataclass(frozen=True)
class LayerScaleSummary:
    """The scales of one layer.

    Attributes:
      k, v: the scales that an FP8 cache uses, 1 in place of invalid ones; None for a layer that the
        model or the checkpoint does not have.
      k_offset: the K offset; None if there is none.
      sources: all scales found for the layer, valid or not: full tensor names, or a file and layer.
      granularity: "tensor", "head" or "channel"; None if no scale is used.
      verdict: "used", or each issue with the fallback of `strict=False`.
    """

    layer: int
    k: Range | None
    v: Range | None
    k_offset: Range | None
    sources: tuple[str, ...]
    granularity: str | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class ScaleSummary:
    """The KV scales of a model.

    Attributes:
      tensors: full names of the scale tensors among the weights.
      granularity: the finest of all layers; None without scales.
      layers: all layers with scales or missing scales, and layers that the model does not have.
      issues: the issues that strict loading refuses, each with the fallback of `strict=False`.
      file: the file beside the weights that scales come from, if any.
      notes: warnings.
      unused: scales that are not used: those of queries, of probabilities, of layers that the model
        does not have, and of unknown names.
    """

    tensors: tuple[str, ...]
    granularity: str | None
    layers: tuple[LayerScaleSummary, ...]
    issues: tuple[str, ...]
    file: str | None
    notes: tuple[str, ...]
    unused: tuple[str, ...]

    @classmethod
    def of(cls, report: ScaleReport, tensors: Iterable[str]) -> "ScaleSummary":
        """Summarize the report on a checkpoint whose scale tensors have these names."""
        layers = tuple(_layer_summaries(report))
        used = [layer.granularity for layer in layers if layer.granularity]
        unused = [scale.source for scale in report.other_scales]
        unused += [issue.source for issue in report.issues if issue.fallback == IGNORED]
        notes = list(report.notes)
        if report.scales is not None and report.scales.kv_dtype not in (None, "fp8_e4m3"):
            notes.append(f"its KV scales are for {report.scales.kv_dtype}.")
        return cls(
            tensors=tuple(tensors),
            granularity=max(used, key=GRANULARITIES.index, default=None),
            layers=layers,
            issues=tuple(f"{issue}: {issue.fallback}" for issue in report.issues),
            file=report.file,
            notes=tuple(notes),
            unused=tuple(dict.fromkeys(unused)),
        )

    @classmethod
    def in_memory(cls, scales: KVScales | None) -> "ScaleSummary":
        """Summarize the scales of a `Params`."""
        if scales is None:
            return cls.of(ScaleReport(), ())
        return cls.of(ScaleReport.from_kv_scales(scales, source=IN_MEMORY), ())


def _layer_summaries(report: ScaleReport) -> Iterator[LayerScaleSummary]:
    layers = {layer.layer: layer for layer in report.layers}
    numbers = {*layers, *(scale.layer for scale in report.other_scales)}
    numbers |= {issue.layer for issue in report.issues if issue.layer is not None}
    for number in sorted(numbers):
        others = [scale for scale in report.other_scales if scale.layer == number]
        issues = [issue for issue in report.issues if issue.layer == number]
        yield _layer_summary(number, layers.get(number), others, issues)


def _layer_summary(
    number: int, layer: LayerScales | None, others: list[StoredScale], issues: list[ScaleIssue]
) -> LayerScaleSummary:
    kv_issues = list(layer.issues) if layer else []  # listed before those of unused scales
    issues = kv_issues + [issue for issue in issues if issue not in kv_issues]
    invalid = [issue.source for issue in issues]
    sources = [scale.source for scale in [*(layer.stored if layer else ()), *others]]
    if layer is None:
        sources += invalid  # not for existing layers: their issues may be missing scales
    return LayerScaleSummary(
        layer=number,
        k=None if layer is None else value_range(layer.k),
        v=None if layer is None else value_range(layer.v),
        k_offset=None if layer is None else value_range(layer.k_offset),
        sources=tuple(dict.fromkeys(sources)),
        granularity=None if layer is None else layer.granularity,
        verdict="; ".join(_verdicts(layer, others, issues)),
    )


def _verdicts(
    layer: LayerScales | None, others: list[StoredScale], issues: list[ScaleIssue]
) -> Iterator[str]:
    if layer is not None and not layer.issues:
        formats = " and ".join(layer.converted_from)
        yield f"used, converted from {formats}" if formats else "used"
    for issue in issues:
        yield f"{issue.source} {issue.message}: {issue.fallback}"
    invalid = {issue.source for issue in issues}
    for scale in others:
        if scale.source not in invalid:
            yield f"{scale.source} ({format_range(value_range(scale.value))}) is not used"


def value_range(value: np.ndarray | None) -> Range | None:
    """Return the smallest and the largest value, or None."""
    return None if value is None else (float(value.min()), float(value.max()))


def format_range(value: Range | None) -> str:
    """Return "low to high", one number if both are equal, or "-" for None."""
    if value is None:
        return "-"
    low, high = value
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def scale_tables(scales: ScaleSummary, lines: box.Box | None) -> Iterator[RenderableType]:
    """Yield a table of all layers, then issues that concern no single layer, and notes."""
    if scales.layers:
        yield from gap(lines)
        yield _layer_table(scales.layers, lines)
    remarks = [issue for issue in scales.issues if not issue.startswith("layer ")]
    remarks += [f"Note: {note}" for note in scales.notes]
    if scales.issues:
        remarks.append(STRICT_NOTE)
    if remarks and not (lines and scales.layers):
        yield ""
    yield from map(Text, remarks)


def _layer_table(layers: tuple[LayerScaleSummary, ...], lines: box.Box | None) -> RenderableType:
    has_offsets = any(layer.k_offset for layer in layers)
    columns = ["K scale", "V scale", "source", "one per", "verdict"]
    if has_offsets:
        columns.insert(2, "K offset")
    table = empty_table(lines, "layer", *columns, text=columns, first="right", fold=True)
    for layer in layers:
        values = [layer.k, layer.v]
        if has_offsets:
            values.append(layer.k_offset)
        table.add_row(
            f"{layer.layer}",
            *map(format_range, values),
            ", ".join(layer.sources) or "-",
            layer.granularity or "-",
            layer.verdict,
        )
    return table
