"""`KVPlan`: the KV cache format and scales of each layer, as `plan_kv` returns them."""

import dataclasses
from typing import Any

from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.scales import TOKEN_HEAD, KVScales, read_scale_file, write_scale_file
from jfp8kv.core.errors import CheckpointError, ConfigError, number_ranges
from jfp8kv.core.formats import kv_format
from jfp8kv.core.types import PathLike


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The KV cache of one layer.

    Attributes:
      kv_dtype: name of the format, such as "fp8_e4m3".
      scales: for FP8, the granularity of the scales: "unit", "tensor", "head", "channel" or
        "token_head".
      k_offset: whether a constant is subtracted from keys before they are stored.
      loss: KL divergence in nats per token if only this layer is quantized, as measured for the
        plan; None if it was not measured.
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
      layers: the format of each layer.
      scales: static scales and K offsets of all layers; 1 and 0 for layers without.
      bytes_per_token: for K and V of all layers, in the longest sequence, as in `llm.stats`.
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
        """Return all fields but `scales`, as JSON types."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return {"bytes_per_token": self.bytes_per_token, "loss": self.loss, "layers": layers}

    def save(self, path: PathLike) -> None:
        """Write a safetensors file: the scales as arrays, the other fields in its metadata."""
        write_scale_file(path, "KVPlan", self.scales.arrays, self.to_dict())

    @classmethod
    def load(cls, path: PathLike) -> "KVPlan":
        """Read a file that `save` wrote. Raises `CheckpointError` for any other file."""
        arrays, metadata = read_scale_file(path, "kv_dtype", "KVPlan")
        if "layers" not in metadata:
            raise CheckpointError(f"kv_dtype={str(path)!r}: not a KVPlan file (it has no layers).")
        layers = tuple(LayerPlan(**layer) for layer in metadata["layers"])
        scales = KVScales.from_arrays(arrays, None)
        return cls(layers, scales, metadata["bytes_per_token"], metadata["loss"])

    def check(self, layers: int) -> None:
        """Raise `ConfigError` unless the plan is for a model with this number of layers."""
        if len(self.layers) != layers:
            raise ConfigError(
                f"kv_dtype is a plan for {len(self.layers)} layers, and this model has {layers}."
            )
