"""`KVPlan`: the format and scales of each layer. `plan_kv` returns it, `kv_dtype` takes it."""

import dataclasses
import os
from typing import Any

from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.scales import TOKEN_HEAD, KVScales, read_file, write_file
from jfp8kv.core.errors import ConfigError, number_ranges
from jfp8kv.core.formats import kv_format


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one layer stores.

    Attributes:
      kv_dtype: name of the format.
      scales: for FP8, the granularity of the scales: "unit", "tensor", "head", "channel" or
        "token_head".
      k_offset: whether a constant is subtracted from keys before they are stored.
      loss: quality loss if only this layer is quantized, as measured for the plan; None if it was
        not measured.
    """

    kv_dtype: str
    scales: str | None = None
    k_offset: bool = False
    loss: float | None = None

    def __str__(self) -> str:
        parts = [self.kv_dtype]
        if self.scales:
            parts.append(f"{self.scales} scales")
        if self.k_offset:
            parts.append("K offset")
        return ", ".join(parts)

    @property
    def spec(self) -> LayerCacheSpec:
        """What the pool stores for this layer."""
        return LayerCacheSpec(kv_format(self.kv_dtype), self.scales == TOKEN_HEAD)


@dataclasses.dataclass(frozen=True, eq=False)
class KVPlan:
    """The format and scales of each layer. Pass it as `kv_dtype` to `generate`, `LLM`, ...

    Attributes:
      layers: what each layer stores.
      scales: static scales and offsets of all layers; 1 (and 0) for layers that need none.
      bytes_per_token: K and V of all layers, for the longest sequence, as in `llm.stats`.
      loss: KL divergence from the unquantized cache in nats per token, measured for the whole plan;
        None if it was not measured.

    Example:
      plan = jfp8kv.plan_kv(params, texts, budget="1GiB")
      plan.save("plan.safetensors")
      jfp8kv.generate(params, prompts, kv_dtype="plan.safetensors")
    """

    layers: tuple[LayerPlan, ...]
    scales: KVScales
    bytes_per_token: float
    loss: float | None = None

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss:.3g}"
        return f"KVPlan({len(self.layers)} layers, {self.bytes_per_token:,.0f} bytes/token{loss})"

    def __str__(self) -> str:
        numbers: dict[str, list[int]] = {}
        for number, layer in enumerate(self.layers):
            numbers.setdefault(str(layer), []).append(number)
        title = f"{self.bytes_per_token:,.0f} bytes/token"
        if self.loss is not None:
            title += f", KL {self.loss:.3g} nats/token from the unquantized cache"
        lines = [f"layers {number_ranges(found)}: {spec}" for spec, found in numbers.items()]
        return "\n".join([title, *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the arrays of the scales, in JSON types."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return {"bytes_per_token": self.bytes_per_token, "loss": self.loss, "layers": layers}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the scales as arrays, the layers in its metadata."""
        write_file(path, "KVPlan", self.scales.arrays, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KVPlan":
        """Read a file that `save` wrote. Raises `CheckpointError` for any other file."""
        arrays, metadata = read_file(path, "kv_dtype", "KVPlan")
        layers = tuple(LayerPlan(**layer) for layer in metadata["layers"])
        scales = KVScales.of(arrays, None)
        return cls(layers, scales, metadata["bytes_per_token"], metadata["loss"])

    def check(self, layers: int) -> None:
        """Raise `ConfigError` unless the plan has this number of layers."""
        if len(self.layers) != layers:
            raise ConfigError(
                f"kv_dtype is a plan for {len(self.layers)} layers, and this model has {layers}."
            )
