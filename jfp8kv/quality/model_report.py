"""`inspect`: a model, the size of its KV cache and its KV scales, without reading the weights.

Sizes follow from the shapes in the config. Cache sizes are computed by `CacheConfig`, as in an
engine.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfp8kv.cache.config import context_length, resolve_cache
from jfp8kv.checkpoint.load import ModelLike, read_checkpoint_info
from jfp8kv.core.errors import number_ranges
from jfp8kv.core.report import Report, empty_table, gap
from jfp8kv.engine.buckets import default_prefill_chunk, max_tokens_per_dispatch
from jfp8kv.engine.options import EngineOptions, KVDtype, KVScalesLike
from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.models.params import Params
from jfp8kv.quality.model_costs import (
    GIB,
    AttentionLayers,
    CacheCost,
    WeightsSummary,
    attention_layers,
    cache_costs,
)
from jfp8kv.quality.scale_summary import ScaleSummary, scale_tables

LENGTHS = (1024, 8192)  # sequence lengths whose cost is shown, besides max_model_len
_MAX_RUNS = 6  # runs of layers listed before "..."
_NORMS = {"rms": "RMS", "rms_plus_one": "RMS (1 + weight)", "layer": "layer norm"}
_QK_NORMS = {
    "head": "; queries and keys per head",
    "row": "; queries and keys over all heads",
    None: "",
}


@dataclasses.dataclass(frozen=True)
class EndToken:
    """A token that ends a sequence.

    Attributes:
      id: its id.
      text: its text, None without a tokenizer.
      sources: the files or metadata that name it.
    """

    id: int
    text: str | None
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class ModelReport(Report):
    """A model, its sizes and its KV scales. Prints as tables; `to_dict` returns everything.

    Attributes:
      source, kind: where the model is, and in what format.
      model: the config.
      weights: number, size and storage of the weights.
      attention: the layers, grouped by window and RoPE.
      caches: the size of the cache in each format.
      scales: the KV scales of the checkpoint.
      tokenizer, chat_template: whether the model has them.
      end_tokens: the tokens that end a sequence, and where each comes from.
      max_model_len, page_size: as in `LLM`.
      max_tokens_per_dispatch: the maximum number of tokens that one dispatch adds to a sequence.
        Layers with a sliding window store that many tokens besides the window.
    """

    source: str
    kind: str
    model: ModelConfig
    weights: WeightsSummary
    attention: tuple[AttentionLayers, ...]
    caches: tuple[CacheCost, ...]
    scales: ScaleSummary
    tokenizer: bool
    chat_template: bool
    end_tokens: tuple[EndToken, ...]
    max_model_len: int
    page_size: int
    max_tokens_per_dispatch: int

    def __repr__(self) -> str:
        parameters = f"{self.weights.parameters:,} parameters"
        return f"ModelReport({self.source!r}, {self.model.architecture}, {parameters})"

    def _layout(self, lines: box.Box | None) -> Group:
        return Group(
            Text(f"{self.source} ({self.kind})", style="bold"),
            "",
            _facts_table(self),
            *gap(lines),
            _attention_table(self, lines),
            *gap(lines),
            *_cache_table(self, lines),
            *scale_tables(self.scales, lines),
        )


def inspect(
    model: ModelLike,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
    max_model_len: int | None = None,
    page_size: int = 64,
) -> ModelReport:
    """Describe a model, the size of its KV cache in each format, and its KV scales by layer.

    Only the config, headers and scales are read, not the weights. Invalid scales are reported and
    do not raise.

        print(jfp8kv.inspect("path/or/hub-id", kv_dtype="fp8"))

    Args:
      model: a `Params`, or a path or hub id as for `load`. For a hub model only the small files are
        downloaded. A folder without weights is accepted.
      kv_dtype, kv_scales, max_model_len, page_size: the requested cache, as in `LLM`, whose `stats`
        have the same numbers. The common formats are always listed.

    Raises:
      CheckpointError, ConfigError: a config or headers of a model that cannot be loaded or run.
    """
    options = EngineOptions(
        kv_dtype=kv_dtype, kv_scales=kv_scales, max_model_len=max_model_len, page_size=page_size
    )
    if isinstance(model, Params):
        weights = WeightsSummary.in_memory(model)
        scales = ScaleSummary.in_memory(model.kv_scales)
        sources = {"config": model.config.eos_ids}
        return _report(model, "Params", "Params in memory", weights, scales, sources, options)
    info = read_checkpoint_info(model, weights=False)
    params = info.abstract_params()
    weights = WeightsSummary.of_checkpoint(info, params)
    scales = ScaleSummary.of(info.scale_report, info.scale_tensors)
    return _report(params, os.fspath(model), info.kind, weights, scales, info.end_sources, options)


def _report(
    params: Params,
    source: str,
    kind: str,
    weights: WeightsSummary,
    scales: ScaleSummary,
    end_sources: Mapping[str, Sequence[int]],
    options: EngineOptions,
) -> ModelReport:
    config = params.config
    max_model_len = context_length(config, options.max_model_len)
    span = max_tokens_per_dispatch(default_prefill_chunk())
    requested = resolve_cache(
        params,
        options.kv_dtype,
        options.kv_scales,
        page_size=options.page_size,
        max_tokens_per_dispatch=span,
        max_model_len=max_model_len,
    )
    lengths = [*(length for length in LENGTHS if length < max_model_len), max_model_len]
    return ModelReport(
        source=source,
        kind=kind,
        model=config,
        weights=weights,
        attention=attention_layers(config),
        caches=cache_costs(params, requested, lengths),
        scales=scales,
        tokenizer=params.tokenizer is not None,
        chat_template=bool(getattr(params.tokenizer, "has_chat_template", False)),
        end_tokens=_end_tokens(params, end_sources),
        max_model_len=max_model_len,
        page_size=options.page_size,
        max_tokens_per_dispatch=span,
    )


def _end_tokens(params: Params, sources: Mapping[str, Sequence[int]]) -> tuple[EndToken, ...]:
    """Return the end-of-sequence tokens with their sources, the tokenizer among them."""
    tokenizer = params.tokenizer
    named = dict(sources)
    if tokenizer is not None and not any(key.startswith("tokenizer.") for key in sources):
        named["tokenizer"] = tokenizer.eos_ids
    return tuple(
        EndToken(
            token,
            None if tokenizer is None else tokenizer.token_text(token),
            tuple(name for name, found in named.items() if token in found),
        )
        for token in params.eos_ids
    )


# -- facts -----------------------------------------------------------------------------------------


def _facts_table(report: ModelReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for label, text in (
        *_model_facts(report.model),
        *_weight_facts(report.weights),
        ("tokenizer", _tokenizer_text(report)),
        ("end tokens", _end_tokens_text(report)),
        ("KV scales", _scales_text(report)),
    ):
        table.add_row(label, text)
    return table


def _model_facts(config: ModelConfig) -> Iterator[tuple[str, str]]:
    yield "architecture", config.architecture
    yield "layers", f"{config.layers}, hidden size {config.hidden:,}"
    yield (
        "heads",
        f"{config.q_heads} query heads, {config.kv_heads} KV heads (groups of {config.group}), "
        f"head_dim {config.head_dim}",
    )
    if config.dense_layers:
        gated = ", gated" if config.gated_mlp else ""
        yield "MLP", f"size {config.mlp_hidden:,}, {config.activation}{gated}"
    if config.experts:
        yield "experts", _experts_text(config)
    yield "norms", _norms_text(config)
    head = "tied to the embeddings" if config.tied_embeddings else "with a separate head"
    yield "vocabulary", f"{config.vocab:,}, output {head}"
    learned = ", learned position embeddings" if config.learned_positions else ""
    yield "context", f"{config.max_len:,} tokens{learned}"


def _experts_text(config: ModelConfig) -> str:
    experts = config.experts
    assert experts is not None
    layers = "every layer" if not config.dense_layers else f"{len(experts.layers)} layers"
    gate = ", with a clamped gate" if experts.clamped else ""
    shared = (
        f", and a shared one of size {experts.shared_hidden:,}" if experts.shared_hidden else ""
    )
    return (
        f"{experts.top_k} of {experts.count} in {layers}, of size {experts.hidden:,}{gate}{shared}"
    )


def _norms_text(config: ModelConfig) -> str:
    places = []
    if config.pre_norm:
        places.append("before")
    if config.post_norm:
        places.append("after")
    norm = f"{_NORMS[config.norm]} {' and '.join(places)} attention and MLP"
    return f"{norm}{_QK_NORMS[config.qk_norm]}; eps {config.norm_eps:g}"


def _weight_facts(weights: WeightsSummary) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{weights.parameters:,}"
    formats = ", ".join(f"{count} {name}" for name, count in weights.tensors.items())
    tensors = formats or "no weights found: sizes follow from the config"
    if weights.quantization:
        tensors += f" ({weights.quantization})"
    if weights.vision_tensors:
        tensors += f"; {weights.vision_tensors} tensors of a vision encoder are ignored"
    yield "tensors", tensors
    memory = f"{_format_bytes(weights.bytes_in_memory)} in memory as {weights.dtype}"
    if weights.bytes_on_disk is not None:
        memory = f"{_format_bytes(weights.bytes_on_disk)} on disk, {memory}"
    yield "weights", memory


def _tokenizer_text(report: ModelReport) -> str:
    if not report.tokenizer:
        return "none found: prompts are token ids"
    return f"found, {'with' if report.chat_template else 'without'} a chat template"


def _end_tokens_text(report: ModelReport) -> str:
    return (
        "; ".join(
            f"{end.id}{'' if end.text is None else f' {end.text!r}'} ({', '.join(end.sources)})"
            for end in report.end_tokens
        )
        or "none: a sequence ends at max_tokens"
    )


def _scales_text(report: ModelReport) -> str:
    scales = report.scales
    names = scales.tensors
    parts = []
    if names:
        last = f" to {names[-1]}" if len(names) > 1 else ""
        parts.append(f"{len(names)} tensors: {names[0]}{last}")
    if scales.file:
        parts.append(f"{'also ' if names else ''}in {scales.file}")
    if scales.granularity:
        parts.append(f"one per {scales.granularity}")
    if not parts:
        parts.append("none found")
    if report.model.kv_cache_dtype:
        parts.append(f"the config declares an {report.model.kv_cache_dtype} cache")
    if scales.issues:
        parts.append(f"ISSUES: {len(scales.issues)}, see below")
    return "; ".join(parts)


# -- attention -------------------------------------------------------------------------------------


def _attention_table(report: ModelReport, lines: box.Box | None) -> Table:
    columns = ["attention", "RoPE", "which"]
    table = empty_table(lines, "layers", *columns, text=columns, first="right", fold=True)
    for group in report.attention:
        window = f"window of {group.window:,} tokens" if group.window else "full"
        rope = _rope_text(group.rope, report.model)
        table.add_row(f"{len(group.layers)}", window, rope, number_ranges(group.layers, _MAX_RUNS))
    return table


def _rope_text(rope: RopeConfig | None, config: ModelConfig) -> str:
    if rope is None:
        return "none"
    part = "" if rope.share == 1 else f" on {rope.rotated(config.head_dim)} features"
    factor = "" if rope.kind == "default" else f", x{rope.factor:g}"
    return f"{rope.kind}{part}, theta {rope.theta:,.0f}{factor}"


# -- cache -----------------------------------------------------------------------------------------


def _cache_table(report: ModelReport, lines: box.Box | None) -> Iterator[RenderableType]:
    lengths = [f"{cost.tokens:,} tokens" for cost in report.caches[0].sequences]
    table = empty_table(lines, "KV cache", "bytes/token", "tokens/GiB", *lengths, fold=True)
    for cost in report.caches:
        sizes = [_format_bytes(sequence.bytes) for sequence in cost.sequences]
        table.add_row(cost.name, f"{cost.bytes_per_token:,.0f}", f"{cost.tokens_per_gib:,}", *sizes)
    has_windows = bool(report.model.windows)
    if has_windows:
        _add_rows_without_windows(table, report.caches)
    yield table
    yield Text(
        f"* is the requested cache. Pages of {report.page_size} tokens, K and V of all layers."
    )
    if has_windows:
        yield Text(
            "A layer with a sliding window stores the window and the tokens of one dispatch, up to "
            f"{report.max_tokens_per_dispatch:,}. Bytes per token are the average over a sequence "
            f"of {report.max_model_len:,} tokens."
        )


def _add_rows_without_windows(table: Table, caches: Sequence[CacheCost]) -> None:
    """Add the sizes of the same sequences with full attention everywhere, and the ratio."""
    table.add_section()
    table.add_row("without windows:", style="dim")
    for cost in caches:
        bytes_per_token = cost.bytes_per_token_without_windows
        sizes = [_format_bytes(sequence.bytes_without_windows) for sequence in cost.sequences]
        tokens_per_gib = int(GIB / bytes_per_token)
        table.add_row(
            cost.name, f"{bytes_per_token:,.0f}", f"{tokens_per_gib:,}", *sizes, style="dim"
        )
    ratios = (f"{sequence.ratio:.0%}" for sequence in caches[0].sequences)
    table.add_row("ratio", "", "", *ratios)


def _format_bytes(count: int) -> str:
    """Return three digits and a binary unit."""
    size = float(count)
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    decimals = 0 if units[0] == "bytes" or size >= 100 else 1
    return f"{size:.{decimals}f} {units[0]}"
