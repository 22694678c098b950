"""The sizes of a model: its weights, its attention layers, and its KV cache in each format."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from jfp8kv.cache.config import CacheConfig, resolve_cache
from jfp8kv.cache.scales import TOKEN_HEAD, UNIT
from jfp8kv.checkpoint.load import CheckpointInfo
from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.models.params import Params

CACHES = (("bfloat16", UNIT), ("fp8_e4m3", UNIT), ("fp8_e5m2", UNIT), ("fp8_e4m3", TOKEN_HEAD))
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class WeightsSummary:
    """The weights of a model.

    Attributes:
      parameters: the number of parameters that the model uses.
      dtype: once loaded.
      bytes_in_memory: once loaded.
      bytes_on_disk: of the files with weights; None without files.
      tensors: the number of tensors stored in each format ("BF16", "Q4_K").
      quantization: how the weights are quantized, or the tool that quantized the cache alone.
      vision_tensors: tensors of a vision encoder, which are ignored.
    """

    parameters: int
    dtype: str
    bytes_in_memory: int
    bytes_on_disk: int | None
    tensors: dict[str, int]
    quantization: str | None
    vision_tensors: int

    @classmethod
    def of_checkpoint(cls, info: CheckpointInfo, shapes: Params) -> "WeightsSummary":
        """Summarize the weights of a checkpoint. `shapes` are the abstract params of loading it."""
        files = {tensor.file for tensor in info.weights.values()}
        scheme = info.weight_scheme
        return cls(
            parameters=shapes.size,
            dtype=shapes.dtype.name,
            bytes_in_memory=shapes.nbytes,
            bytes_on_disk=sum(map(_file_bytes, files)) if files else None,
            tensors=_count(tensor.stored_dtype for tensor in info.weights.values()),
            quantization=str(scheme) if scheme else info.quant_method,
            vision_tensors=info.vision_tensors,
        )

    @classmethod
    def in_memory(cls, params: Params) -> "WeightsSummary":
        """Summarize loaded weights."""
        return cls(
            parameters=params.size,
            dtype=params.dtype.name,
            bytes_in_memory=params.nbytes,
            bytes_on_disk=None,
            tensors=_count(str(leaf.dtype) for leaf in jax.tree.leaves(params.tree)),
            quantization=None,
            vision_tensors=0,
        )


def _count(formats: Iterable[str]) -> dict[str, int]:
    """Return the number of occurrences of each format, the most frequent first."""
    return dict(Counter(formats).most_common())


def _file_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclasses.dataclass(frozen=True)
class AttentionLayers:
    """Layers with the same window (in tokens, 0 for full attention) and RoPE (None for none)."""

    layers: tuple[int, ...]
    window: int
    rope: RopeConfig | None


def attention_layers(config: ModelConfig) -> tuple[AttentionLayers, ...]:
    """Group the layers of a model by window and RoPE."""
    groups: dict[tuple[int, RopeConfig | None], list[int]] = {}
    for layer in range(config.layers):
        groups.setdefault((config.window(layer), config.rope(layer)), []).append(layer)
    return tuple(
        AttentionLayers(tuple(layers), window, rope) for (window, rope), layers in groups.items()
    )


@dataclasses.dataclass(frozen=True)
class SequenceCost:
    """The cache of one sequence of `tokens` tokens, in whole pages, with and without windows."""

    tokens: int
    bytes: int
    bytes_without_windows: int
    ratio: float


@dataclasses.dataclass(frozen=True)
class CacheCost:
    """The size of one cache.

    Attributes:
      kv_dtype: the format, or several with their number of layers.
      scales: "static" or "token_head".
      requested: whether the arguments of `inspect` name this cache.
      bytes_per_token: K and V of all layers, averaged over the longest sequence, as in `llm.stats`.
      tokens_per_gib: tokens in a GiB of cache.
      sequences: the cost of sequences of a few lengths.
    """

    kv_dtype: str
    scales: str
    requested: bool
    bytes_per_token: float
    bytes_per_token_without_windows: float
    tokens_per_gib: int
    sequences: tuple[SequenceCost, ...]

    @property
    def name(self) -> str:
        """The label of tables."""
        scales = "" if self.scales == "static" else f" {self.scales}"
        return f"{self.kv_dtype}{scales}{' *' if self.requested else ''}"

    @classmethod
    def of(cls, cache: CacheConfig, lengths: Sequence[int], *, requested: bool) -> "CacheCost":
        """Return the cost of a cache for sequences of these lengths, the longest last."""
        without_windows = cache.without_windows
        sequences = []
        for tokens in lengths:
            size = cache.sequence_bytes(tokens)
            full_size = without_windows.sequence_bytes(tokens)
            sequences.append(SequenceCost(tokens, size, full_size, size / full_size))
        bytes_per_token = cache.bytes_per_token(lengths[-1])
        return cls(
            kv_dtype=cache.name,
            scales=_scales_name(cache),
            requested=requested,
            bytes_per_token=bytes_per_token,
            bytes_per_token_without_windows=without_windows.bytes_per_token(lengths[-1]),
            tokens_per_gib=int(GIB / bytes_per_token),
            sequences=tuple(sequences),
        )


def cache_costs(
    params: Params, requested: CacheConfig, lengths: Sequence[int]
) -> tuple[CacheCost, ...]:
    """Return the costs of `CACHES`, preceded by those of `requested` if it is not among them."""
    configs = {}
    for kv_dtype, kv_scales in CACHES:
        cache = resolve_cache(
            params,
            kv_dtype,
            kv_scales,
            page_size=requested.page_size,
            max_tokens_per_dispatch=requested.max_tokens_per_dispatch,
        )
        configs[_cache_key(cache)] = cache
    key = _cache_key(requested)
    if key not in configs:
        configs = {key: requested} | configs
    return tuple(
        CacheCost.of(cache, lengths, requested=each == key) for each, cache in configs.items()
    )


def _cache_key(cache: CacheConfig) -> tuple[str, str]:
    return cache.name, _scales_name(cache)


def _scales_name(cache: CacheConfig) -> str:
    return TOKEN_HEAD if cache.dynamic else "static"
