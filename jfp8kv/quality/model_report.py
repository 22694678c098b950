"""What a checkpoint is, what its KV cache costs and which scales it brings, found without reading its weights.

Sizes are those of the shapes that the config asks for; bytes of cache come from `CacheConfig`, which an engine asks too.
"""

import dataclasses
import html
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jfp8kv.cache.config import CacheConfig, context_length, resolve_cache
from jfp8kv.cache.scales import TOKEN_HEAD, UNIT
from jfp8kv.checkpoint.load import CheckpointInfo
from jfp8kv.engine.buckets import default_prefill_chunk, max_tokens_per_dispatch
from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.models.params import Params
from jfp8kv.quality.scale_report import Scales

CACHES = (("bfloat16", UNIT), ("fp8_e4m3", UNIT), ("fp8_e5m2", UNIT), ("fp8_e4m3", TOKEN_HEAD))
LENGTHS = (1024, 8192)  # tokens of the texts whose cost is shown, beside the longest
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Weights:
    """`parameters` counts what the model uses. `tensors` counts the checkpoint's by how they are stored ("BF16", "Q4_K"); it
    is empty, and `bytes_on_disk` None, where no weights are there."""

    parameters: int
    dtype: str  # once loaded
    bytes_in_memory: int
    bytes_on_disk: int | None
    tensors: dict[str, int]
    quantization: (
        str | None
    )  # how the weights are quantized, or the tool that quantized the cache alone
    vision_tensors: int  # left out


@dataclasses.dataclass(frozen=True)
class AttentionLayers:
    """Layers that attend alike: `window` in tokens, 0 sees all; `rope` is None where nothing is rotated."""

    layers: tuple[int, ...]
    window: int
    rope: RopeConfig | None


@dataclasses.dataclass(frozen=True)
class SequenceCost:
    """Bytes of cache that one text of `tokens` tokens takes, in whole pages, and as if no layer had a window."""

    tokens: int
    bytes: int
    bytes_without_windows: int
    ratio: float


@dataclasses.dataclass(frozen=True)
class CacheCost:
    """One kind of cache. Bytes per token cover K and V of all layers, as in `llm.stats`: averaged over the longest text.

    `scales` is "static" or "token_head"; `asked`: whether this is the cache that the arguments of `inspect` name.
    """

    kv_dtype: str
    scales: str
    asked: bool
    bytes_per_token: float
    bytes_per_token_without_windows: float
    tokens_per_gib: int
    texts: tuple[SequenceCost, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class ModelReport:
    """A model, its costs and its scales. Prints as tables; `to_dict` has everything."""

    source: str
    kind: str
    model: ModelConfig
    weights: Weights
    attention: tuple[AttentionLayers, ...]
    caches: tuple[CacheCost, ...]
    scales: Scales
    tokenizer: bool
    chat_template: bool
    max_model_len: int
    page_size: int
    max_tokens_per_dispatch: (
        int  # tokens that one dispatch may add: pages of a window last so much longer
    )

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, of types that JSON has."""
        found = dataclasses.asdict(self)
        found["model"]["group"] = self.model.group
        return found

    def __repr__(self) -> str:
        return f"ModelReport({self.source!r}, {self.model.architecture}, {self.weights.parameters:,} parameters)"

    def __str__(self) -> str:
        from jfp8kv.core.report import plain
        from jfp8kv.quality.model_tables import layout

        return plain(layout(self, lines=None))

    def __rich__(self) -> Any:
        from jfp8kv.quality.model_tables import layout

        return layout(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def report(
    found: CheckpointInfo | Params,
    source: str,
    *,
    kv_dtype: Any,
    kv_scales: Any,
    max_model_len: Any,
    page_size: Any,
) -> ModelReport:
    """Inspect what `read_checkpoint_info` returned, or weights in memory, under these settings of a cache."""
    params = found if isinstance(found, Params) else found.abstract_params()
    config, span = params.config, max_tokens_per_dispatch(default_prefill_chunk())
    longest = context_length(config, max_model_len)
    asked = resolve_cache(
        params,
        kv_dtype,
        kv_scales,
        page_size=page_size,
        max_tokens_per_dispatch=span,
        longest=longest,
    )
    lengths = sorted({*(length for length in LENGTHS if length < longest), longest})
    unread = isinstance(found, CheckpointInfo)
    return ModelReport(
        source=source,
        kind=found.kind if unread else "Params in memory",
        model=config,
        weights=_weights_of_files(found, params) if unread else _weights_in_memory(params),
        attention=_attention(config),
        caches=_costs(params, asked, lengths),
        scales=Scales.of(found.scale_report, found.scale_tensors)
        if unread
        else Scales.in_memory(params.kv_scales),
        tokenizer=params.tokenizer is not None,
        chat_template=bool(getattr(params.tokenizer, "has_chat_template", False)),
        max_model_len=longest,
        page_size=page_size,
        max_tokens_per_dispatch=span,
    )


def _weights_of_files(found: CheckpointInfo, shapes: Params) -> Weights:
    files = {tensor.file for tensor in found.weights.values()}
    return Weights(
        parameters=shapes.size,
        dtype=shapes.dtype.name,
        bytes_in_memory=shapes.nbytes,
        bytes_on_disk=sum(map(_size, files)) if files else None,
        tensors=_counted(tensor.stored_dtype for tensor in found.weights.values()),
        quantization=str(found.weight_scheme) if found.weight_scheme else found.quant_method,
        vision_tensors=found.vision_tensors,
    )


def _weights_in_memory(params: Params) -> Weights:
    return Weights(
        parameters=params.size,
        dtype=params.dtype.name,
        bytes_in_memory=params.nbytes,
        bytes_on_disk=None,
        tensors=_counted(str(leaf.dtype) for leaf in jax.tree.leaves(params.tree)),
        quantization=None,
        vision_tensors=0,
    )


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    """How often each comes, the most frequent first."""
    return dict(Counter(kinds).most_common())


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _attention(c: ModelConfig) -> tuple[AttentionLayers, ...]:
    alike: dict[tuple[int, RopeConfig | None], list[int]] = {}
    for layer in range(c.layers):
        alike.setdefault((c.window(layer), c.rope(layer)), []).append(layer)
    return tuple(AttentionLayers(tuple(layers), *kind) for kind, layers in alike.items())


def _costs(params: Params, asked: CacheConfig, lengths: list[int]) -> tuple[CacheCost, ...]:
    """The usual caches, and before them the one that was asked for unless it is among them."""
    sizes = {"page_size": asked.page_size, "max_tokens_per_dispatch": asked.max_tokens_per_dispatch}
    usual = {_kind(kv): kv for kv in (resolve_cache(params, *cache, **sizes) for cache in CACHES)}
    each = usual if _kind(asked) in usual else {_kind(asked): asked} | usual
    return tuple(_cost(kv, kind == _kind(asked), lengths) for kind, kv in each.items())


def _kind(kv: CacheConfig) -> tuple[str, str]:
    return kv.name, TOKEN_HEAD if kv.dynamic else "static"


def _cost(kv: CacheConfig, asked: bool, lengths: list[int]) -> CacheCost:
    whole, longest = kv.without_windows, lengths[-1]
    texts = [
        (tokens, kv.sequence_bytes(tokens), whole.sequence_bytes(tokens)) for tokens in lengths
    ]
    per_token = kv.bytes_per_token(longest)
    return CacheCost(
        *_kind(kv),
        asked=asked,
        bytes_per_token=per_token,
        bytes_per_token_without_windows=whole.bytes_per_token(longest),
        tokens_per_gib=int(GIB / per_token),
        texts=tuple(SequenceCost(tokens, held, full, held / full) for tokens, held, full in texts),
    )
