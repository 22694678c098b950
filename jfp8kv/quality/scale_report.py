"""The KV scales that a model brings, layer by layer: what an FP8 cache uses, where it comes from, and a verdict on it."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.kv_scale_tensors import GRANULARITIES, StoredScale
from jfp8kv.checkpoint.kv_scales import IGNORED, LayerScales, ScaleIssue, ScaleReport

IN_MEMORY = "Params.kv_scales"
Spread = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class ScaleRow:
    """One layer.

    Attributes:
      k, v: of the scales that an FP8 cache uses, the least and the largest over heads and channels: 1 for what is no good, None
        if there are none or no such layer.
      k_offset: likewise of what is subtracted from keys, None if nothing is.
      sources: what was read for the layer, good or not: tensors by their full names, or a file and the layer.
      granularity: "tensor", "head" or "channel"; None if nothing that was read is used.
      verdict: "used", or what is wrong and what stands in for it where loading is not strict.
    """

    layer: int
    k: Spread | None
    v: Spread | None
    k_offset: Spread | None
    sources: tuple[str, ...]
    granularity: str | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Scales:
    """KV scales that come with the model.

    Attributes:
      tensors: those among the weights, by their full names.
      granularity: the finest, None if there are none.
      rows: a row for each layer that has or should have scales, those that the model lacks included.
      problems: what strict loading refuses, each with what is done if it is not strict.
      elsewhere: the file beside the weights that scales come from, None if there is none.
      notes: what there is to say beside.
      unused: what was read and has no use: scales of queries and probabilities, of layers that are not there, of unknown names.
    """

    tensors: tuple[str, ...]
    granularity: str | None
    rows: tuple[ScaleRow, ...]
    problems: tuple[str, ...]
    elsewhere: str | None
    notes: tuple[str, ...]
    unused: tuple[str, ...]

    @classmethod
    def of(cls, found: ScaleReport, tensors: Iterable[str]) -> "Scales":
        """What a checkpoint's reader reported; `tensors` are the names it was given."""
        unused = [scale.source for scale in found.other_scales] + [
            p.source for p in found.issues if p.fallback == IGNORED
        ]
        rows, made_for = tuple(_rows(found)), found.scales and found.scales.kv_dtype
        return cls(
            tensors=tuple(tensors),
            granularity=max(
                (row.granularity for row in rows if row.granularity),
                key=GRANULARITIES.index,
                default=None,
            ),
            rows=rows,
            problems=tuple(f"{problem}: {problem.fallback}" for problem in found.issues),
            elsewhere=found.file,
            notes=(
                *found.notes,
                *(
                    []
                    if made_for in (None, "fp8_e4m3")
                    else [f"its KV scales are made for {made_for}."]
                ),
            ),
            unused=tuple(dict.fromkeys(unused)),
        )

    @classmethod
    def in_memory(cls, scales: KVScales | None) -> "Scales":
        """Those of a `Params`."""
        return cls.of(
            ScaleReport() if scales is None else ScaleReport.from_kv_scales(scales, source=IN_MEMORY), ()
        )


def _rows(found: ScaleReport) -> Iterator[ScaleRow]:
    layers = {layer.layer: layer for layer in found.layers}
    told = {
        *layers,
        *(scale.layer for scale in found.other_scales),
        *(p.layer for p in found.issues if p.layer is not None),
    }
    for number in sorted(told):
        others = [scale for scale in found.other_scales if scale.layer == number]
        problems = [problem for problem in found.issues if problem.layer == number]
        yield _row(number, layers.get(number), others, problems)


def _row(
    number: int, layer: LayerScales | None, others: list[StoredScale], problems: list[ScaleIssue]
) -> ScaleRow:
    first = layer.issues if layer else ()
    problems = [
        *first,
        *(problem for problem in problems if problem not in first),
    ]  # of K and V, then of what is not used
    bad = [problem.source for problem in problems]
    verdict = [f"{problem.source} {problem.message}: {problem.fallback}" for problem in problems]
    if layer is not None and not layer.issues:
        verdict.insert(
            0,
            "used" + (f", converted from {' and '.join(layer.converted_from)}" if layer.converted_from else ""),
        )
    verdict += [
        f"{scale.source} ({_value(scale)}) has no use here"
        for scale in others
        if scale.source not in bad
    ]
    read = [scale.source for scale in (*(layer.stored if layer else ()), *others)]
    return ScaleRow(
        layer=number,
        k=layer and spread(layer.k),
        v=layer and spread(layer.v),
        k_offset=None if layer is None or layer.k_offset is None else spread(layer.k_offset),
        sources=tuple(
            dict.fromkeys(read if layer else read + bad)
        ),  # of a layer that is there, what is bad may be missing
        granularity=layer and layer.granularity,
        verdict="; ".join(verdict),
    )


def spread(value: np.ndarray) -> Spread:
    """The least and the largest."""
    return float(value.min()), float(value.max())


def words(found: Spread | None) -> str:
    """One number, or two."""
    low, high = found or (None, None)
    return "-" if low is None else f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def _value(scale: StoredScale) -> str:
    return words(None if scale.value is None else spread(scale.value))
