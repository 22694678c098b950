"""The KV-cache scales that come with a checkpoint: read, checked layer by layer, and reported.

FP8 caches fail in practice through scales: of a name that nobody matched, zero, for a layer that is not there, made for
another format. So nothing found is dropped unsaid. `find_scales` never raises for a bad scale: it gives a report,
`FoundScales`, whose `say` raises or warns. Scales are float32 and belong to E4M3FN (largest 448), whatever they were made
for; `real = stored * scale`. Why each choice is as it is: docs/notes/008.
"""

import dataclasses
import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.kv_names import of_layer, scale_name
from jfp8kv.checkpoint.kv_sidecar import SIDECAR, Sidecar
from jfp8kv.checkpoint.safetensors import DTYPES
from jfp8kv.checkpoint.tensors import StoredTensor
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.quantization import is_static_kv, scales_made_for

# What a scale is multiplied by to mean the same in E4M3FN. A code of E4M3FNUZ is half of what it is in E4M3FN, so tools double
# the scales for it; those for E5M2 reach 57344 where E4M3FN's reach 448.
FACTORS = {"fp8_e4m3": 1.0, "fp8_e4m3fnuz": 0.5, "fp8_e5m2": 57344 / 448}
_CONVERTED = {
    "fp8_e4m3fnuz": "halved, as a code of that format (largest 240) means half of what it does in E4M3FN",
    "fp8_e5m2": "multiplied by 128, the ratio of the largest values of E5M2 and E4M3FN (57344 / 448)",
}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
# Outside of these, one over a scale, or a scale times the largest code, leaves float32's normal numbers.
_SMALLEST, _LARGEST = 2.0**-110, 2.0**110
_FALLBACK = "scale 1 is used there"
LEFT_OUT = "it is left out"
_NOT_USED = "it would not be used anyway"
_SHOWN = 8  # problems that an error lists; a warning lists all


GRANULARITIES = ("tensor", "head", "channel")  # by the number of axes of one layer's scale
Place = tuple[int, str]  # a layer, and "k" or "v"


@dataclasses.dataclass(frozen=True, eq=False)
class ReadScale:
    """One scale as it was read.

    Attributes:
      part: "k", "v", "kv" (for both), "q" or "prob".
      value: float32, `[]` or `[heads]`, converted to E4M3FN; None if it cannot be used.
      source: the tensor's full name, or the file and layer.
      stored: the dtype in the file.
      made_for: the format it was made for.
      problem: why it cannot be used, as the end of a sentence that begins with `source`; None when it can.
    """

    layer: int
    part: str
    value: np.ndarray | None
    source: str
    stored: str
    made_for: str = "fp8_e4m3"
    problem: str | None = None

    @property
    def granularity(self) -> str:
        """ "tensor" for one scale a layer, "head", or "channel" (of our own files alone)."""
        return GRANULARITIES[0 if self.value is None else self.value.ndim]


class Problem(NamedTuple):
    """Something that strict loading refuses. `layer` is None for what belongs to none."""

    layer: int | None
    source: str
    what: str
    fallback: str

    def __str__(self) -> str:
        return (
            "" if self.layer is None else f"layer {self.layer}: "
        ) + f"{self.source} {self.what}"


@dataclasses.dataclass(frozen=True)
class LayerFound:
    """What one layer of the model got.

    Attributes:
      k, v: float32, `[]` or `[kv_heads]` (or `[kv_heads, head_dim]`, of our own files alone); 1 stands in for what is no good.
      read: the scales that are there for it, good or not.
      used: those behind `k` and `v`.
      problems: what is wrong with them.
      k_offset: what is subtracted from keys, of the same shapes (of our own files alone).
    """

    layer: int
    k: np.ndarray
    v: np.ndarray
    read: tuple[ReadScale, ...]
    used: tuple[ReadScale, ...]
    problems: tuple[Problem, ...] = ()
    k_offset: np.ndarray | None = None

    @property
    def granularity(self) -> str | None:
        """The finest of the scales used, None if none is."""
        return max(
            (scale.granularity for scale in self.used), key=GRANULARITIES.index, default=None
        )

    @property
    def made_for(self) -> tuple[str, ...]:
        """The formats that the scales used were converted from."""
        return tuple(sorted({scale.made_for for scale in self.used} - {"fp8_e4m3"}))


@dataclasses.dataclass(frozen=True)
class FoundScales:
    """A checkpoint's KV scales.

    Attributes:
      layers: one entry for each layer of the model, or none if no K or V scale was found.
      others: scales of queries and probabilities: reported, not used, since attention itself is not quantized here.
      problems: what strict loading refuses.
      notes: what there is to say beside.
      declares: the `kv_dtype` that the side-car declares, else None.
      file: the file beside the weights that scales come from, if there is one.
      scales: what an FP8 cache uses, None if nothing was found or what was found is for another kind of cache.
    """

    layers: tuple[LayerFound, ...] = ()
    others: tuple[ReadScale, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    declares: str | None = None
    file: str | None = None
    scales: KVScales | None = None

    @classmethod
    def of(cls, scales: KVScales, *, source: str) -> "FoundScales":
        """The report on scales from a file of ours, `source`: sound, or there would be no `KVScales`."""
        layers = []
        for layer in range(len(scales.k)):
            own = {name: _trimmed(value[layer]) for name, value in scales.arrays.items()}
            used = tuple(ReadScale(layer, part, own[part], source, "F32") for part in "kv")
            layers.append(
                LayerFound(layer, own["k"], own["v"], used, used, k_offset=own.get("k_offset"))
            )
        return cls(layers=tuple(layers), scales=scales)

    def say(self, where: Path, *, strict: bool, stacklevel: int = 2) -> None:
        """Warn of `notes`; of problems too, or raise a `CheckpointError`, if strict. Layers and tensors are named."""
        if strict and self.problems:
            shown = "; ".join(map(str, self.problems[:_SHOWN]))
            more = (
                f"; and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
            )
            raise CheckpointError(
                f"{where}: its KV-cache scales cannot be used as they are. At fault: {shown}{more}. `jfp8kv inspect` shows "
                "all layers. Fix them; or have scale 1 stand in for what is missing or broken, and what belongs nowhere left "
                "out: load with strict=False, or give --lenient on the command line."
            )
        if self.problems:
            told = "; ".join(f"{problem}: {problem.fallback}" for problem in self.problems)
            warnings.warn(f"{where}: KV-cache scales: {told}.", stacklevel=stacklevel)
        for note in self.notes:
            warnings.warn(f"{where}: {note}", stacklevel=stacklevel)


def find_scales(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    quantization: Mapping[str, Any] | None = None,
    sidecar: Sidecar | None = None,
    model_types: Collection[str | None] = (),
) -> FoundScales:
    """Read and judge the scales of a checkpoint. Only a few bytes are read: weights are not touched.

    Args:
      config: the model's.
      tensors: every tensor that `kv_names.is_kv_scale` knows, by its full name.
      quantization: config.json's `quantization_config`.
      sidecar: what `kv_cache_scales.json` says, if there is one.
      model_types: config.json's, one of which the side-car must be made for; none accept any.

    Raises:
      CheckpointError: a tensor whose bytes are not there; a malformed config.
    """
    made_for = scales_made_for(quantization)
    if made_for not in FACTORS and tensors:
        note = f"{len(tensors)} KV-cache scale tensors (such as {next(iter(tensors))}) are left out: they are made for {made_for}."
        return FoundScales(notes=(note,))
    read, problems = _read_tensors(config, tensors, made_for) if tensors else ([], [])
    if sidecar is not None:
        read += _read_sidecar(sidecar)
        if sidecar.model_type and any(model_types) and sidecar.model_type not in model_types:
            theirs = " or ".join(repr(each) for each in model_types if each)
            what = f"is made for model_type {sidecar.model_type!r}, and this model is {theirs}"
            problems.append(Problem(None, SIDECAR, what, "it is used all the same"))
    others = tuple(scale for scale in read if scale.part in ("q", "prob"))
    problems += [
        Problem(scale.layer, scale.source, scale.problem, _NOT_USED)
        for scale in others
        if scale.problem is not None
    ]
    problems += [_no_such_layer(scale, config) for scale in read if scale.layer >= config.layers]
    by_place = _by_place(read, config)
    found = tuple(_judge(layer, by_place) for layer in range(config.layers)) if by_place else ()
    return FoundScales(
        layers=found,
        others=others,
        problems=(*problems, *(problem for layer in found for problem in layer.problems)),
        notes=tuple(_notes(config, found, quantization, sidecar)),
        declares=sidecar.kv_dtype if sidecar else None,
        file=SIDECAR if sidecar else None,
        scales=_stacked(found) if found else None,
    )


# Reading


def _read_tensors(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], made_for: str
) -> tuple[list[ReadScale], list[Problem]]:
    read, problems = [], []
    for tensor in tensors.values():
        name = scale_name(tensor.name)
        if name is None:
            what = "looks like a KV-cache scale, but of no published layout: its use is not known"
            problems.append(Problem(None, tensor.name, what, LEFT_OUT))
        elif name.is_zero_point:
            if np.any(_values(tensor)):
                # It stands for the scale beside it, which is no good without it.
                what = "is not zero: a cache that is not symmetric is not supported"
                read.append(
                    ReadScale(
                        name.layer, name.part, None, tensor.name, tensor.stored, made_for, what
                    )
                )
        else:
            heads = {"q": config.q_heads, "prob": 1}.get(name.part, config.kv_heads)
            value, problem = _checked(tensor, heads, FACTORS[made_for])
            read.append(
                ReadScale(
                    name.layer, name.part, value, tensor.name, tensor.stored, made_for, problem
                )
            )
    return sorted(read, key=lambda scale: scale.layer), problems


def _checked(
    tensor: StoredTensor, heads: int, factor: float
) -> tuple[np.ndarray | None, str | None]:
    """The scale, `[]` or `[heads]`, or what is wrong with it."""
    if tensor.stored not in _FLOATS:
        return None, f"is stored as {tensor.stored}: must be one of {', '.join(_FLOATS)}"
    sizes = [size for size in tensor.shape if size != 1]
    if sizes not in ([], [heads]):
        per_head = (
            f", or [{heads}] or [{heads}, 1, 1], one for each of its heads" if heads > 1 else ""
        )
        return (
            None,
            f"has shape {list(tensor.shape)}: must be [] or [1], one for the layer{per_head}",
        )
    value = _values(tensor).reshape(sizes)
    return (
        (None, problem)
        if (problem := _broken(value))
        else (np.asarray(value * np.float32(factor)), None)
    )


def _values(tensor: StoredTensor) -> np.ndarray:
    values = np.full(tensor.shape, np.nan, np.float32)
    if tensor.stored in DTYPES:
        tensor.read(values)
    return values


def _broken(value: np.ndarray) -> str | None:
    bad = ~((value >= _SMALLEST) & (value <= _LARGEST))  # NaN is neither
    if not bad.any():
        return None
    at = np.unravel_index(int(np.argmax(bad)), value.shape)
    number, head = float(value[at]), f" for head {int(at[0])}" if value.ndim else ""
    if math.isfinite(number) and number > 0:
        return f"is {number:g}{head}: a scale must lie between {_SMALLEST:.2g} and {_LARGEST:.2g}"
    return f"is {number:g}{head}: a scale must be positive and finite"


def _read_sidecar(sidecar: Sidecar) -> list[ReadScale]:
    """One scale a layer: the largest of its ranks'."""
    read = []
    for layer, ranks in sidecar.layers.items():
        problem = next(
            (told for rank, scale in enumerate(ranks) if (told := _broken_rank(rank, scale))), None
        )
        value = None
        if problem is None:
            value = np.array(
                max(scale for scale in ranks if scale is not None) * FACTORS[sidecar.made_for],
                np.float32,
            )
        read.append(
            ReadScale(
                layer, "kv", value, f"{SIDECAR}: layer {layer}", "JSON", sidecar.made_for, problem
            )
        )
    return read


def _broken_rank(rank: int, scale: float | None) -> str | None:
    return f"has no scale for rank {rank}" if scale is None else _broken(np.array(scale))


# Judging


def _by_place(read: Iterable[ReadScale], config: ModelConfig) -> dict[Place, list[ReadScale]]:
    """The scales for K and for V of each layer that the model has, in the order of the layers."""
    by_place = defaultdict(list)
    for scale in read:
        if scale.layer < config.layers and scale.part in ("k", "v", "kv"):
            for part in scale.part:
                by_place[scale.layer, part].append(scale)
    return dict(by_place)


def _judge(layer: int, by_place: Mapping[Place, list[ReadScale]]) -> LayerFound:
    """What this layer uses, and what is wrong with its scales."""
    values, read, used, problems = {}, [], [], []
    for part in "kv":
        values[part], behind, wrong = _choose(layer, part, by_place)
        read += by_place.get((layer, part), [])
        used += behind
        problems += wrong
    once = [
        tuple(dict.fromkeys(each)) for each in (read, used, problems)
    ]  # one scale for both is read, and wrong, once
    return LayerFound(layer, values["k"], values["v"], *once)


def _choose(
    layer: int, part: str, by_place: Mapping[Place, list[ReadScale]]
) -> tuple[np.ndarray, list[ReadScale], list[Problem]]:
    """The value for K or V of a layer, the scales it comes from, and why it is not simply what the file says."""
    there = by_place.get((layer, part), [])
    broken = [
        Problem(layer, scale.source, scale.problem, _FALLBACK)
        for scale in there
        if scale.problem is not None
    ]
    if not there:
        broken = [_missing(layer, part, by_place)]
    if broken:
        return np.ones((), np.float32), [], broken
    values = [scale.value for scale in there if scale.value is not None]
    if all(np.array_equal(value, values[0]) for value in values):
        return values[0], there, []
    others = " and ".join(scale.source for scale in there[1:])
    what = f"and {others} differ, and only one of them can be the scale of {part.upper()}"
    return (
        functools.reduce(np.maximum, values),
        there,
        [Problem(layer, there[0].source, what, "the larger is used")],
    )


def _missing(layer: int, part: str, by_place: Mapping[Place, list[ReadScale]]) -> Problem:
    """Named after the same part's scale in another layer, or where none has it, after the half of the pair that is there."""
    named = {
        place: [s.source for s in there if not s.source.endswith("zero_point")]
        for place, there in by_place.items()
    }
    half = (named.get((layer, "v" if part == "k" else "k")) or [""])[0]
    alike = next(
        (sources[0] for (_, other), sources in named.items() if other == part and sources), None
    )
    if alike is None:
        anyone = half or next(
            (sources[0] for sources in named.values() if sources), f"{part}_scale"
        )
        return Problem(
            layer,
            of_layer(anyone, layer),
            f"has no {part.upper()} scale beside it: half a pair",
            _FALLBACK,
        )
    return Problem(
        layer,
        of_layer(alike, layer),
        f"is missing{half and f' beside {half}: half a pair'}",
        _FALLBACK,
    )


def _no_such_layer(scale: ReadScale, config: ModelConfig) -> Problem:
    what = f"belongs to no layer: the model has {config.layers}, from 0 to {config.layers - 1}"
    return Problem(scale.layer, scale.source, what, LEFT_OUT)


def _stacked(found: Iterable[LayerFound]) -> KVScales:
    def stack(values: list[np.ndarray]) -> np.ndarray:
        heads = max(value.size for value in values)
        return np.stack([np.broadcast_to(value, heads) for value in values])[..., None]

    return KVScales(
        stack([layer.k for layer in found]),
        stack([layer.v for layer in found]),
        kv_dtype="fp8_e4m3",
    )


def _trimmed(value: np.ndarray) -> np.ndarray:
    """`[kv_heads or 1, head_dim or 1]` without the trailing axes that one scale spans."""
    while value.ndim and value.shape[-1] == 1:
        value = value[..., 0]
    return value


# Telling


def _notes(
    config: ModelConfig, found: tuple[LayerFound, ...], quantization: Any, sidecar: Sidecar | None
) -> Iterator[str]:
    for made_for in sorted({made_for for layer in found for made_for in layer.made_for}):
        yield f"its KV-cache scales are made for {made_for}: {_CONVERTED[made_for]}."
    if sidecar is not None and (
        uneven := [layer for layer, ranks in sidecar.layers.items() if len(set(ranks)) > 1]
    ):
        yield (
            f"{SIDECAR} has scales of {len(sidecar.layers[uneven[0]])} tensor-parallel ranks that differ (in {len(uneven)} "
            f"layers, first in layer {uneven[0]}): the largest is used, which clips nothing."
        )
    declared = config.kv_cache_dtype or (sidecar and sidecar.kv_dtype)
    if found and not declared:
        yield (
            "KV-cache scales found, but its config declares no FP8 cache: kv_dtype='auto' stays at the weights' dtype; "
            "kv_dtype='fp8_e4m3' uses them."
        )
    if not found and declared and is_static_kv(quantization):
        yield f"its config declares an {declared} cache but no scales for it are there: scale 1 is used."
