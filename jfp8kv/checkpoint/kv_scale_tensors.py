"""Read the KV-cache scales of a checkpoint: tensor names, stored values, and vLLM's JSON side-car.

A tensor name gives the layer and the part: "k", "v", "kv" (one scale for both), "q" or "prob"
(queries and probabilities, used by engines that quantize attention itself). The table covers the
names that compressed-tensors (LLM Compressor), ModelOpt, Quark, AutoFP8 and vLLM write, and the
names that vLLM reads. Invalid scales do not raise: `StoredScale.error` says what is wrong.

The side-car `kv_cache_scales.json` is what vLLM's first tools wrote:

    {"model_type": "llama",
     "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"<rank>": {"<layer>": scale}}}}

It has one scale for K and V, per tensor-parallel rank. Each rank had a share of the heads, so where
ranks differ the largest scale fits every head (docs/notes/008).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfp8kv.checkpoint.safetensors import DTYPES
from jfp8kv.checkpoint.tensors import StoredTensor
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.layouts import strip_prefix

SIDECAR = "kv_cache_scales.json"
GRANULARITIES = ("tensor", "head", "channel")  # by the number of axes of one layer's scale

# Factors that convert a scale to E4M3FN. An E4M3FNUZ code is half the value of the same E4M3FN
# code, so tools double the scales for it. Scales for E5M2 map to 57344 where E4M3FN's map to 448.
TO_E4M3FN = {"fp8_e4m3": 1.0, "fp8_e4m3fnuz": 0.5, "fp8_e5m2": 57344 / 448}

_LAYER = r"(?:backbone\.|decoder\.)?(?:layers|h)\.(?P<layer>\d+)"
_ATTENTION = r"(?:self_attn|self_attention|attention|attn|mixer)"
_SUFFIX = r"_(?:scale|(?P<zero_point>zero_point|scale_zero_point))"
_ATTRIBUTE = r"(?:scale|(?P<zero_point>zero_point))"
_CONVENTIONS = {
    name: re.compile(rf"{_LAYER}\.{_ATTENTION}\.{rest}")
    for name, rest in {
        "compressed-tensors": rf"(?P<part>[qkv]){_SUFFIX}",
        "ModelOpt": rf"(?P<part>[qkv])_proj\.(?P=part){_SUFFIX}",
        "Quark": rf"(?:(?P<part>[qkv])_proj\.output|(?P<prob>prob)(?:_output)?){_SUFFIX}",
        "AutoFP8": rf"(?P<part>kv){_SUFFIX}",
        "fused projection": rf"(?:qk)?qkv_proj\.(?P<part>[qkv]){_SUFFIX}",
        "attention module": rf"attn\.(?P<part>[qkv]|kv|prob){_SUFFIX}",
        "cache module": rf"(?P<part>[kv])_cache\.{_ATTRIBUTE}",
        "module": rf"(?P<part>[qkv])\.{_ATTRIBUTE}",
    }.items()
}
# Names that follow no known convention but can only mean a KV scale. They are reported by name
# instead of being read as weights.
_LOOKS_LIKE_A_SCALE = re.compile(
    r"(^|\.)("
    r"(q|k|v|kv|qkv|key|value|query|prob)(_cache)?(_output)?"
    r"_(scale|scales|scale_inv|zero_point|scale_zero_point)"
    r"|(q|k|v|kv|qkv)_proj\.output_(scale|zero_point)"
    r"|(k|v|kv|key|value)_cache\.(scale|zero_point)"
    r"|(attn|attention|mixer)\.[qkv]\.(scale|zero_point))$"
)

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
# Outside this range, 1 / scale or scale * largest code is not a normal float32 number.
_SMALLEST = 2.0**-110
_LARGEST = 2.0**110

_SIDECAR_FORMATS = {
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e4m3": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8": "fp8_e4m3",
    "float8_e4m3fnuz": "fp8_e4m3fnuz",
    "fp8_e4m3fnuz": "fp8_e4m3fnuz",
    "float8_e5m2": "fp8_e5m2",
    "fp8_e5m2": "fp8_e5m2",
}


# Names


class ScaleName(NamedTuple):
    """The fields of a scale tensor's name."""

    layer: int
    part: str
    convention: str
    is_zero_point: bool


def is_kv_scale(name: str) -> bool:
    """Return whether a tensor name means a scale or zero point of the KV cache.

    This includes names that follow no known convention but can only mean a KV scale.
    """
    return _LOOKS_LIKE_A_SCALE.search(name) is not None or parse_scale_name(name) is not None


def parse_scale_name(name: str) -> ScaleName | None:
    """Return the fields of a tensor name, or None if it follows no known convention."""
    for convention, pattern in _CONVENTIONS.items():
        if match := pattern.fullmatch(strip_prefix(name)):
            groups = match.groupdict()
            part = groups.get("part") or groups["prob"]
            is_zero_point = groups["zero_point"] is not None
            return ScaleName(int(groups["layer"]), part, convention, is_zero_point)
    return None


def rename_layer(source: str, layer: int) -> str:
    """Return the name of the same tensor, or of the same side-car entry, in another layer."""
    pattern = r"((?:^|\.)(?:layers|h)\.|: layer )\d+(?=\.|$)"
    return re.sub(pattern, rf"\g<1>{layer}", source, count=1)


# Values


@dataclasses.dataclass(frozen=True, eq=False)
class StoredScale:
    """One scale of a checkpoint.

    Attributes:
      part: "k", "v", "kv" (for both), "q" or "prob".
      value: float32, `[]` or `[heads]`, converted to E4M3FN; None if the scale is invalid.
      source: the full tensor name, or the file and layer.
      stored_dtype: the dtype in the file.
      fp8_format: the format that the file's scale is for.
      error: why the scale is invalid, as the rest of a sentence that begins with `source`.
    """

    layer: int
    part: str
    value: np.ndarray | None
    source: str
    stored_dtype: str
    fp8_format: str = "fp8_e4m3"
    error: str | None = None

    @property
    def granularity(self) -> str:
        """The granularity: "tensor", "head", or, in files of this library only, "channel"."""
        return GRANULARITIES[0 if self.value is None else self.value.ndim]


def read_scale_tensor(
    tensor: StoredTensor, name: ScaleName, config: ModelConfig, fp8_format: str
) -> StoredScale | None:
    """Read a scale tensor. Return None for a zero point of zero, which has no effect.

    A nonzero zero point is an error of the scale it belongs to: the scale is unusable without it.
    """
    value: np.ndarray | None = None
    error: str | None
    if name.is_zero_point:
        if not np.any(_read_values(tensor)):
            return None
        error = "is not zero: asymmetric KV-cache quantization is not supported"
    else:
        heads = {"q": config.q_heads, "prob": 1}.get(name.part, config.kv_heads)
        error = _dtype_or_shape_error(tensor, heads)
        if error is None:
            value = _read_values(tensor).reshape([size for size in tensor.shape if size != 1])
            error = _value_error(value)
        value = None if error or value is None else value * np.float32(TO_E4M3FN[fp8_format])
    return StoredScale(
        name.layer,
        name.part,
        None if value is None else np.asarray(value),
        tensor.name,
        tensor.stored_dtype,
        fp8_format,
        error,
    )


def _dtype_or_shape_error(tensor: StoredTensor, heads: int) -> str | None:
    if tensor.stored_dtype not in _FLOATS:
        return f"is stored as {tensor.stored_dtype}: must be one of {', '.join(_FLOATS)}"
    if [size for size in tensor.shape if size != 1] in ([], [heads]):
        return None
    per_head = f", or [{heads}] or [{heads}, 1, 1] (one per head)" if heads > 1 else ""
    return f"has shape {list(tensor.shape)}: must be [] or [1] (one per layer){per_head}"


def _read_values(tensor: StoredTensor) -> np.ndarray:
    values = np.full(tensor.shape, np.nan, np.float32)
    if tensor.stored_dtype in DTYPES:
        tensor.read(values)
    return values


def _value_error(value: np.ndarray) -> str | None:
    invalid = ~((value >= _SMALLEST) & (value <= _LARGEST))  # True for NaN
    if not invalid.any():
        return None
    at = np.unravel_index(int(np.argmax(invalid)), value.shape)
    number = float(value[at])
    head = f" for head {int(at[0])}" if value.ndim else ""
    if math.isfinite(number) and number > 0:
        return f"is {number:g}{head}: a scale must lie between {_SMALLEST:.2g} and {_LARGEST:.2g}"
    return f"is {number:g}{head}: a scale must be positive and finite"


# The side-car


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The content of `kv_cache_scales.json`.

    Attributes:
      fp8_format: the format that the scales are for.
      layers: by layer, the scale of each tensor-parallel rank; None where a rank has none.
    """

    fp8_format: str
    model_type: str | None
    layers: Mapping[int, tuple[float | None, ...]]

    @property
    def kv_dtype(self) -> str:
        """The `kv_dtype` that the file declares for the cache."""
        return "fp8_e5m2" if self.fp8_format == "fp8_e5m2" else "fp8_e4m3"

    def scales(self) -> list[StoredScale]:
        """Return one scale per layer: the largest of its ranks."""
        return [self._scale(layer, ranks) for layer, ranks in self.layers.items()]

    def _scale(self, layer: int, ranks: tuple[float | None, ...]) -> StoredScale:
        errors = [_rank_error(rank, scale) for rank, scale in enumerate(ranks)]
        error = next(filter(None, errors), None)
        value = None
        if error is None:
            largest = max(scale for scale in ranks if scale is not None)
            value = np.array(largest * TO_E4M3FN[self.fp8_format], np.float32)
        source = f"{SIDECAR}: layer {layer}"
        return StoredScale(layer, "kv", value, source, "JSON", self.fp8_format, error)


def _rank_error(rank: int, scale: float | None) -> str | None:
    return f"has no scale for rank {rank}" if scale is None else _value_error(np.array(scale))


def parse_sidecar(content: Mapping[str, Any], *, where: Path) -> Sidecar:
    """Return a side-car from its JSON content. The values of the scales are not checked here.

    Raises:
      CheckpointError: malformed content, naming the file `where` and the entry.
    """
    cache = content.get("kv_cache")
    if not isinstance(cache, Mapping):
        raise CheckpointError(
            f"{where}: kv_cache={cache!r}: must be an object with dtype and scaling_factor."
        )
    dtype = cache.get("dtype")
    if not isinstance(dtype, str) or dtype not in _SIDECAR_FORMATS:
        allowed = ", ".join(_SIDECAR_FORMATS)
        raise CheckpointError(f"{where}: kv_cache.dtype={dtype!r}: must be one of {allowed}.")
    ranks = cache.get("scaling_factor")
    if (
        not isinstance(ranks, Mapping)
        or not ranks
        or not all(isinstance(layers, Mapping) for layers in ranks.values())
    ):
        raise CheckpointError(
            f"{where}: kv_cache.scaling_factor must be an object of ranks, "
            "each an object of layers."
        )
    by_rank = [
        {_layer_index(layer, where): _number(scale, where) for layer, scale in layers.items()}
        for layers in ranks.values()
    ]
    all_layers = sorted(set().union(*by_rank))
    model_type = content.get("model_type")
    return Sidecar(
        _SIDECAR_FORMATS[dtype],
        model_type if isinstance(model_type, str) else None,
        {layer: tuple(rank.get(layer) for rank in by_rank) for layer in all_layers},
    )


def _layer_index(layer: str, where: Path) -> int:
    if not layer.isdecimal():
        raise CheckpointError(
            f"{where}: the layer {layer!r} in kv_cache.scaling_factor must be a number."
        )
    return int(layer)


def _number(scale: Any, where: Path) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise CheckpointError(
            f"{where}: the scale {scale!r} in kv_cache.scaling_factor must be a number."
        )
    # Parsing the repr makes an integer beyond float64 infinite, where float(scale) would raise.
    return float(repr(scale))
