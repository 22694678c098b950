"""`KVPlan`: a cache chosen layer by layer, with the scales it needs: what `plan_kv` finds and `generate` takes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.scales import TOKEN_HEAD, KVScales, read_own_file
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import kv_format
from jfp8kv.core.ranges import runs


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: `kv_dtype`, and for FP8 the granularity of its scales ("unit", "tensor", "head", "channel" or
    "token_head"); `k_offset` says whether its keys are stored less a constant.

    `loss` is what this layer alone costs, as measured when the plan was made; None where nothing was.
    """

    kv_dtype: str
    scales: str | None = None
    k_offset: bool = False
    loss: float | None = None

    def __str__(self) -> str:
        parts = [
            self.kv_dtype,
            self.scales and f"{self.scales} scales",
            self.k_offset and "K offset",
        ]
        return ", ".join(part for part in parts if part)

    @property
    def kind(self) -> LayerCacheSpec:
        """As the pool knows it."""
        return LayerCacheSpec(kv_format(self.kv_dtype), self.scales == TOKEN_HEAD)


@dataclasses.dataclass(frozen=True, eq=False)
class KVPlan:
    """A cache chosen by layer. Give it as `kv_dtype` to `generate`, `LLM` and all that take one.

    Attributes:
      layers: what each layer keeps.
      scales: static scales and offsets of all layers; layers that need none have 1 (and 0) there.
      bytes_per_token: K and V of all layers, over a text of the longest length, as in `llm.stats`.
      loss: KL divergence from the unquantized cache, nats per token, measured with the plan as a whole; None if it was not.
    """

    layers: tuple[LayerPlan, ...]
    scales: KVScales
    bytes_per_token: float
    loss: float | None = None

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss:.3g}"
        return f"KVPlan({len(self.layers)} layers, {self.bytes_per_token:,.0f} bytes/token{loss})"

    def __str__(self) -> str:
        lines = [f"layers {runs(which)}: {kept}" for kept, which in self._alike().items()]
        measured = (
            ""
            if self.loss is None
            else f", KL {self.loss:.3g} nats/token from the unquantized cache"
        )
        return "\n".join([f"{self.bytes_per_token:,.0f} bytes/token{measured}", *lines])

    def _alike(self) -> dict[str, list[int]]:
        alike: dict[str, list[int]] = {}
        for number, layer in enumerate(self.layers):
            alike.setdefault(str(layer), []).append(number)
        return alike

    def to_dict(self) -> dict[str, Any]:
        """Everything but the scales' numbers, of types that JSON has."""
        rows = [dataclasses.asdict(layer) for layer in self.layers]
        return {"bytes_per_token": self.bytes_per_token, "loss": self.loss, "layers": rows}

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` as a safetensors file with the scales; the choices are in its header."""
        from safetensors.numpy import save  # `save_file` makes files that nobody else may read

        about = json.dumps({"format": "jfp8kv.KVPlan"} | self.to_dict())
        Path(path).write_bytes(save(self.scales.arrays, metadata={"jfp8kv": about}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KVPlan":
        """Read what `save` wrote. Raises `CheckpointError` for anything else."""
        arrays, about = read_own_file(path, "kv_dtype", "KVPlan")
        layers = tuple(LayerPlan(**layer) for layer in about["layers"])
        return cls(layers, KVScales.of(arrays, None), about["bytes_per_token"], about["loss"])

    def check(self, layers: int) -> None:
        """Raise `ConfigError` unless this is a plan for a model of so many layers."""
        if len(self.layers) != layers:
            raise ConfigError(
                f"kv_dtype is a plan for {len(self.layers)} layers, and this model has {layers}."
            )
