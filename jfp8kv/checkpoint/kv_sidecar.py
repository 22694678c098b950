"""`kv_cache_scales.json`: the scales of a KV cache in a JSON file beside the weights, as vLLM's first tools wrote them.

    {"model_type": "llama",
     "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"<rank>": {"<layer>": scale}}}}

One scale serves keys and values. A rank is a tensor-parallel one, which had a share of the heads: where ranks differ, the
largest scale holds what every head had (docs/notes/008).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jfp8kv.core.errors import CheckpointError

SIDECAR = "kv_cache_scales.json"
_DTYPES = {
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e4m3": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8": "fp8_e4m3",
    "float8_e4m3fnuz": "fp8_e4m3fnuz",
    "fp8_e4m3fnuz": "fp8_e4m3fnuz",
    "float8_e5m2": "fp8_e5m2",
    "fp8_e5m2": "fp8_e5m2",
}


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The file's content: the format it was made for, and by layer the scale of each rank (None where a rank has none)."""

    made_for: str
    model_type: str | None
    layers: Mapping[int, tuple[float | None, ...]]

    @property
    def kv_dtype(self) -> str:
        """The cache it declares, in our names."""
        return "fp8_e5m2" if self.made_for == "fp8_e5m2" else "fp8_e4m3"


def read_sidecar(content: Mapping[str, Any], *, where: Path) -> Sidecar:
    """Check the file's form; the numbers are left as they are. Raises `CheckpointError` naming the file and the entry."""
    cache = content.get("kv_cache")
    if not isinstance(cache, Mapping):
        raise CheckpointError(
            f"{where}: kv_cache={cache!r}: must be an object with dtype and scaling_factor."
        )
    dtype, ranks = cache.get("dtype"), cache.get("scaling_factor")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{where}: kv_cache.dtype={dtype!r}: must be one of {', '.join(_DTYPES)}."
        )
    if (
        not isinstance(ranks, Mapping)
        or not ranks
        or not all(isinstance(layers, Mapping) for layers in ranks.values())
    ):
        raise CheckpointError(
            f"{where}: kv_cache.scaling_factor must be an object of ranks, each an object of layers."
        )
    by_rank = [
        {_index(layer, where): _number(scale, where) for layer, scale in layers.items()}
        for layers in ranks.values()
    ]
    every = sorted(set().union(*by_rank))
    model_type = content.get("model_type")
    return Sidecar(
        _DTYPES[dtype],
        model_type if isinstance(model_type, str) else None,
        {layer: tuple(rank.get(layer) for rank in by_rank) for layer in every},
    )


def _index(layer: str, where: Path) -> int:
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
    return float(
        repr(scale)
    )  # an integer beyond float64 is infinite, where float(scale) would raise
