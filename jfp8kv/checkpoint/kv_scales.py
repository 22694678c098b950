"""Check the KV-cache scales of a checkpoint layer by layer, and report on them.

In practice, FP8 caches fail because of their scales: a name that no loader matches, a zero, a scale
for a layer that does not exist, a scale for another format. So every scale that is found is used or
reported. `check_scales` never raises for an invalid scale: it returns a `ScaleReport`, whose
`raise_or_warn` applies strict or lenient loading. Scales are float32 and for E4M3FN (largest 448)
after conversion; `real = stored * scale`. The choices and their reasons: docs/notes/008.
"""

import dataclasses
import functools
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.kv_scale_tensors import (
    GRANULARITIES,
    SIDECAR,
    TO_E4M3FN,
    Sidecar,
    StoredScale,
    parse_scale_name,
    read_scale_tensor,
    rename_layer,
)
from jfp8kv.checkpoint.tensors import StoredTensor
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.quantization import is_static_kv, kv_scale_format

IGNORED = "it is ignored"
_UNIT_SCALE = "scale 1 is used instead"
_UNUSED = "it would not be used anyway"
_SHOWN = 8  # issues that an error lists; a warning lists all
_CONVERSIONS = {
    "fp8_e4m3fnuz": (
        "halved, because a code of that format (largest 240) is half the value of the same code "
        "in E4M3FN"
    ),
    "fp8_e5m2": (
        "multiplied by 128, the ratio of the largest values of E5M2 and E4M3FN (57344 / 448)"
    ),
}

Place = tuple[int, str]  # a layer, and "k" or "v"


class ScaleIssue(NamedTuple):
    """An invalid scale, which strict loading refuses. `layer` is None if it is not of one layer."""

    layer: int | None
    source: str
    message: str
    fallback: str

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}: "
        return f"{layer}{self.source} {self.message}"


@dataclasses.dataclass(frozen=True)
class LayerScales:
    """The scales of one layer of the model.

    Attributes:
      k, v: float32, `[]` or `[kv_heads]` (or `[kv_heads, head_dim]`, only from files written by
        this library); 1 in place of a missing or invalid scale.
      stored: the scales that the checkpoint has for the layer, valid or not.
      used: the scales that `k` and `v` come from.
      issues: what strict loading refuses.
      k_offset: what is subtracted from keys, of the same shapes (only from files written by this
        library).
    """

    layer: int
    k: np.ndarray
    v: np.ndarray
    stored: tuple[StoredScale, ...]
    used: tuple[StoredScale, ...]
    issues: tuple[ScaleIssue, ...] = ()
    k_offset: np.ndarray | None = None

    @property
    def granularity(self) -> str | None:
        """The finest granularity of the scales used, None if none is used."""
        found = (scale.granularity for scale in self.used)
        return max(found, key=GRANULARITIES.index, default=None)

    @property
    def converted_from(self) -> tuple[str, ...]:
        """The formats other than E4M3FN that the scales used were stored for."""
        return tuple(sorted({scale.fp8_format for scale in self.used} - {"fp8_e4m3"}))


@dataclasses.dataclass(frozen=True)
class ScaleReport:
    """The KV scales of a checkpoint, and what is wrong with them.

    Attributes:
      layers: one entry per layer of the model; empty if the checkpoint has no K or V scale.
      other_scales: scales of queries and probabilities. They are not used, because attention itself
        is not quantized here.
      issues: what strict loading refuses.
      notes: warnings that are not errors, each a sentence.
      declared_kv_dtype: the `kv_dtype` that the side-car declares, else None.
      file: the file beside the weights that the scales come from, if any.
      scales: the scales that an FP8 cache uses; None without any, or if they are for another kind
        of cache.
    """

    layers: tuple[LayerScales, ...] = ()
    other_scales: tuple[StoredScale, ...] = ()
    issues: tuple[ScaleIssue, ...] = ()
    notes: tuple[str, ...] = ()
    declared_kv_dtype: str | None = None
    file: str | None = None
    scales: KVScales | None = None

    @classmethod
    def from_kv_scales(
        cls, scales: KVScales, *, source: str, file: str | None = None
    ) -> "ScaleReport":
        """Return the report on a `KVScales`, which is valid by construction."""
        layers = []
        for layer in range(len(scales.k)):
            values = {name: _squeezed(value[layer]) for name, value in scales.arrays.items()}
            used = tuple(StoredScale(layer, part, values[part], source, "F32") for part in "kv")
            k_offset = values.get("k_offset")
            layers.append(
                LayerScales(layer, values["k"], values["v"], used, used, k_offset=k_offset)
            )
        return cls(layers=tuple(layers), file=file, scales=scales)

    def raise_or_warn(self, where: Path, *, strict: bool, stacklevel: int = 2) -> None:
        """Raise a `CheckpointError` for the issues if strict, else warn about them.

        `notes` are always warnings. Messages name layers and tensors.
        """
        if strict and self.issues:
            shown = "; ".join(map(str, self.issues[:_SHOWN]))
            more = len(self.issues) - _SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            raise CheckpointError(
                f"{where}: invalid KV-cache scales: {shown}{rest}. `jfp8kv inspect` shows all "
                "layers. Fix the scales, or load with strict=False (--no-strict on the command "
                "line), which uses scale 1 for missing and invalid scales and ignores scales "
                "that belong to no layer."
            )
        if self.issues:
            listed = "; ".join(f"{issue}: {issue.fallback}" for issue in self.issues)
            warnings.warn(f"{where}: KV-cache scales: {listed}.", stacklevel=stacklevel)
        for note in self.notes:
            warnings.warn(f"{where}: {note}", stacklevel=stacklevel)


def check_scales(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    quantization: Mapping[str, Any] | None = None,
    sidecar: Sidecar | None = None,
    model_types: Collection[str | None] = (),
) -> ScaleReport:
    """Read and check the scales of a checkpoint. Weights are not read.

    Args:
      config: the model's config.
      tensors: the scale tensors (`is_kv_scale`), by full name.
      quantization: `quantization_config` of config.json.
      sidecar: the content of `kv_cache_scales.json`, if there is one.
      model_types: the `model_type`s of config.json. The side-car must be for one of them; an empty
        collection accepts any.

    Raises:
      CheckpointError: a truncated tensor, or a malformed config.
    """
    fp8_format = kv_scale_format(quantization)
    if fp8_format not in TO_E4M3FN and tensors:
        note = (
            f"{len(tensors)} KV-cache scale tensors (such as {next(iter(tensors))}) are ignored: "
            f"they are for {fp8_format}."
        )
        return ScaleReport(notes=(note,))
    stored, issues = _read_tensors(config, tensors, fp8_format)
    if sidecar is not None:
        stored += sidecar.scales()
        issues += _model_type_issues(sidecar, model_types)
    others = tuple(scale for scale in stored if scale.part in ("q", "prob"))
    issues += [
        ScaleIssue(scale.layer, scale.source, scale.error, _UNUSED)
        for scale in others
        if scale.error is not None
    ]
    issues += [_unknown_layer(scale, config) for scale in stored if scale.layer >= config.layers]
    by_place = _by_place(stored, config)
    layers: tuple[LayerScales, ...] = ()
    if by_place:
        layers = tuple(_layer_scales(layer, by_place) for layer in range(config.layers))
    return ScaleReport(
        layers=layers,
        other_scales=others,
        issues=(*issues, *(issue for layer in layers for issue in layer.issues)),
        notes=tuple(_notes(config, layers, quantization, sidecar)),
        declared_kv_dtype=sidecar.kv_dtype if sidecar else None,
        file=SIDECAR if sidecar else None,
        scales=_stacked(layers) if layers else None,
    )


def _read_tensors(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], fp8_format: str
) -> tuple[list[StoredScale], list[ScaleIssue]]:
    """Return the scales in the order of their layers, and an issue per unknown name."""
    scales = []
    issues = []
    for tensor in tensors.values():
        name = parse_scale_name(tensor.name)
        if name is None:
            message = "looks like a KV-cache scale, but its name follows no known convention"
            issues.append(ScaleIssue(None, tensor.name, message, IGNORED))
        elif scale := read_scale_tensor(tensor, name, config, fp8_format):
            scales.append(scale)
    return sorted(scales, key=lambda scale: scale.layer), issues


def _model_type_issues(sidecar: Sidecar, model_types: Collection[str | None]) -> list[ScaleIssue]:
    known = [each for each in model_types if each]
    if not sidecar.model_type or not known or sidecar.model_type in known:
        return []
    expected = " or ".join(map(repr, known))
    message = f"is for model_type {sidecar.model_type!r}, and this model is {expected}"
    return [ScaleIssue(None, SIDECAR, message, "it is used anyway")]


def _unknown_layer(scale: StoredScale, config: ModelConfig) -> ScaleIssue:
    message = f"belongs to no layer: the model has {config.layers}, 0 to {config.layers - 1}"
    return ScaleIssue(scale.layer, scale.source, message, IGNORED)


def _by_place(stored: Iterable[StoredScale], config: ModelConfig) -> dict[Place, list[StoredScale]]:
    """Group the scales for K and for V by the layers of the model."""
    by_place = defaultdict(list)
    for scale in stored:
        if scale.layer < config.layers and scale.part in ("k", "v", "kv"):
            for part in scale.part:
                by_place[scale.layer, part].append(scale)
    return dict(by_place)


def _layer_scales(layer: int, by_place: Mapping[Place, list[StoredScale]]) -> LayerScales:
    """Return the scales that a layer uses, and what is wrong with them."""
    k, k_used, k_issues = _choose(layer, "k", by_place)
    v, v_used, v_issues = _choose(layer, "v", by_place)
    stored = [*by_place.get((layer, "k"), []), *by_place.get((layer, "v"), [])]
    # A scale for both K and V is listed once.
    return LayerScales(
        layer,
        k,
        v,
        stored=tuple(dict.fromkeys(stored)),
        used=tuple(dict.fromkeys([*k_used, *v_used])),
        issues=tuple(dict.fromkeys([*k_issues, *v_issues])),
    )


def _choose(
    layer: int, part: str, by_place: Mapping[Place, list[StoredScale]]
) -> tuple[np.ndarray, list[StoredScale], list[ScaleIssue]]:
    """Return the scale of K or V in a layer, the stored scales it comes from, and the issues."""
    stored = by_place.get((layer, part), [])
    issues = [
        ScaleIssue(layer, scale.source, scale.error, _UNIT_SCALE)
        for scale in stored
        if scale.error is not None
    ]
    if not stored:
        issues = [_missing(layer, part, by_place)]
    if issues:
        return np.ones((), np.float32), [], issues
    values = [scale.value for scale in stored if scale.value is not None]
    if all(np.array_equal(value, values[0]) for value in values):
        return values[0], stored, []
    others = " and ".join(scale.source for scale in stored[1:])
    message = f"and {others} differ, and only one of them can be the scale of {part.upper()}"
    issue = ScaleIssue(layer, stored[0].source, message, "the larger is used")
    return functools.reduce(np.maximum, values), stored, [issue]


def _missing(layer: int, part: str, by_place: Mapping[Place, list[StoredScale]]) -> ScaleIssue:
    """Return the issue for a missing scale, with the name it would have.

    The name follows the same part's scale in another layer, or, if no layer has one, the other half
    of the pair.
    """
    names = {place: _scale_names(stored) for place, stored in by_place.items()}
    pair = (names.get((layer, "v" if part == "k" else "k")) or [""])[0]
    same_part = next((found[0] for (_, p), found in names.items() if p == part and found), None)
    if same_part is not None:
        beside = f" beside {pair}: half a pair" if pair else ""
        source = rename_layer(same_part, layer)
        return ScaleIssue(layer, source, f"is missing{beside}", _UNIT_SCALE)
    any_name = pair or next((found[0] for found in names.values() if found), f"{part}_scale")
    message = f"has no {part.upper()} scale beside it: half a pair"
    return ScaleIssue(layer, rename_layer(any_name, layer), message, _UNIT_SCALE)


def _scale_names(stored: Iterable[StoredScale]) -> list[str]:
    return [scale.source for scale in stored if not scale.source.endswith("zero_point")]


def _stacked(layers: Sequence[LayerScales]) -> KVScales:
    def stack(values: list[np.ndarray]) -> np.ndarray:
        heads = max(value.size for value in values)
        return np.stack([np.broadcast_to(value, heads) for value in values])[..., None]

    k = stack([layer.k for layer in layers])
    v = stack([layer.v for layer in layers])
    return KVScales(k, v, kv_dtype="fp8_e4m3")


def _squeezed(value: np.ndarray) -> np.ndarray:
    """Remove the trailing axes of size 1 of a `[kv_heads or 1, head_dim or 1]` array."""
    while value.ndim and value.shape[-1] == 1:
        value = value[..., 0]
    return value


def _notes(
    config: ModelConfig,
    layers: tuple[LayerScales, ...],
    quantization: Mapping[str, Any] | None,
    sidecar: Sidecar | None,
) -> Iterator[str]:
    for fp8_format in sorted({each for layer in layers for each in layer.converted_from}):
        yield f"its KV-cache scales are for {fp8_format}: {_CONVERSIONS[fp8_format]}."
    if sidecar is not None:
        uneven = [layer for layer, ranks in sidecar.layers.items() if len(set(ranks)) > 1]
        if uneven:
            yield (
                f"{SIDECAR} has scales of {len(sidecar.layers[uneven[0]])} tensor-parallel ranks "
                f"that differ (in {len(uneven)} layers, first in layer {uneven[0]}): the largest "
                "is used, which clips no values."
            )
    declared = config.kv_cache_dtype or (sidecar.kv_dtype if sidecar else None)
    if layers and not declared:
        yield (
            "it has KV-cache scales, but its config declares no FP8 cache: kv_dtype='auto' keeps "
            "the dtype of the weights; kv_dtype='fp8_e4m3' uses the scales."
        )
    if not layers and declared and is_static_kv(quantization):
        yield f"its config declares an {declared} cache but has no scales for it: scale 1 is used."
