"""An inspection in words: tables for a terminal, and the same without lines or colours for everything else."""

from collections.abc import Iterator, Sequence
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfp8kv.core.errors import number_ranges
from jfp8kv.core.report import LINES
from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.quality.model_report import GIB, CacheCost, ModelReport
from jfp8kv.quality.scale_report import Scales, words

_RUNS = 6  # runs of layers that are listed before "..."
_NORMS = {"rms": "RMS", "rms_plus_one": "RMS (1 + weight)", "layer": "layer norm"}


def layout(found: ModelReport, lines: box.Box | None = LINES) -> Group:
    """The tables of an inspection; `lines` is what is drawn between their parts."""
    gap = [] if lines else [""]  # lines come with empty rows around them
    title = Text(f"{found.source} ({found.kind})", style="bold")
    parts = _attention(found, lines), *gap, *_caches(found, lines)
    return Group(title, "", _facts(found), *gap, *parts, *_layers_scales(found.scales, lines))


# -- what it is ---------------------------------------------------------------------------------------------------------


def _facts(found: ModelReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for label, text in (
        *_model(found.model),
        *_weights(found),
        *_texts(found),
        ("KV scales", _scales(found)),
    ):
        table.add_row(label, text)
    return table


def _model(c: ModelConfig) -> Iterator[tuple[str, str]]:
    yield "architecture", c.architecture
    yield "layers", f"{c.layers}, {c.hidden:,} wide"
    yield (
        "heads",
        f"{c.q_heads} for queries, {c.kv_heads} for keys and values (groups of {c.group}), head_dim {c.head_dim}",
    )
    if c.dense_layers:
        yield "MLP", f"{c.mlp_hidden:,} wide, {c.activation}{', gated' if c.gated_mlp else ''}"
    if e := c.experts:
        gate = " behind a clamped gate" if e.clamped else ""
        shared = f", and one of {e.shared_hidden:,} for every token" if e.shared_hidden else ""
        where = "every layer" if not c.dense_layers else f"{len(e.layers)} layers"
        yield "experts", f"{e.top_k} of {e.count} on {where}, each {e.hidden:,} wide{gate}{shared}"
    sides = " and ".join(
        side for side, there in (("before", c.pre_norm), ("after", c.post_norm)) if there
    )
    rows = {
        "head": "; each head of queries and keys",
        "row": "; queries and keys as rows",
        None: "",
    }[c.qk_norm]
    yield "norms", f"{_NORMS[c.norm]} {sides} attention and MLP{rows}; eps {c.norm_eps:g}"
    yield (
        "vocabulary",
        f"{c.vocab:,}, output {'tied to the embeddings' if c.tied_embeddings else 'by a head of its own'}",
    )
    yield (
        "context",
        f"{c.max_len:,} tokens{', positions from a table' if c.learned_positions else ''}",
    )


def _weights(found: ModelReport) -> Iterator[tuple[str, str]]:
    w = found.weights
    yield "parameters", f"{w.parameters:,}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in w.tensors.items())
    by = f" ({w.quantization})" if w.quantization else ""
    left_out = f"; {w.vision_tensors} of a vision part are left out" if w.vision_tensors else ""
    yield "tensors", f"{kinds or 'no safetensors here: sizes are by the config'}{by}{left_out}"
    memory = f"{_bytes(w.bytes_in_memory)} in memory as {w.dtype}"
    yield (
        "weights",
        memory if w.bytes_on_disk is None else f"{_bytes(w.bytes_on_disk)} on disk, {memory}",
    )


def _texts(found: ModelReport) -> Iterator[tuple[str, str]]:
    template = "with a chat template" if found.chat_template else "without a chat template"
    yield (
        "tokenizer",
        f"found, {template}"
        if found.tokenizer
        else "none that is read here: prompts are token ids",
    )


def _scales(found: ModelReport) -> str:
    scales, declared = found.scales, found.model.kv_cache_dtype
    names, parts = scales.tensors, []
    if names:
        parts.append(
            f"{len(names)} tensors: {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
        )
    if scales.elsewhere:
        parts.append(f"{'also ' if names else ''}in {scales.elsewhere}")
    if scales.granularity:
        parts.append(f"one per {scales.granularity}")
    parts = parts or ["none found"]
    if declared:
        parts.append(f"the config declares an {declared} cache")
    if scales.problems:
        parts.append(f"PROBLEMS: {len(scales.problems)}, see below")
    return "; ".join(parts)


# -- attention by layer -------------------------------------------------------------------------------------------------


def _attention(found: ModelReport, lines: box.Box | None) -> Table:
    table = _table(
        lines,
        ("layers", "right"),
        ("attention sees", "left"),
        ("rotation", "left"),
        ("which", "left"),
    )
    for alike in found.attention:
        sees = f"the last {alike.window:,} tokens" if alike.window else "everything"
        table.add_row(
            f"{len(alike.layers)}",
            sees,
            _rope(alike.rope, found.model),
            number_ranges(alike.layers, _RUNS),
        )
    return table


def _rope(rope: RopeConfig | None, c: ModelConfig) -> str:
    if rope is None:
        return "none"
    part = "" if rope.share == 1 else f" of {rope.rotated(c.head_dim)} features"
    stretched = "" if rope.kind == "default" else f", x{rope.factor:g}"
    return f"{rope.kind}{part}, theta {rope.theta:,.0f}{stretched}"


# -- the cache ----------------------------------------------------------------------------------------------------------


def _caches(found: ModelReport, lines: box.Box | None) -> Iterator[RenderableType]:
    lengths = [text.tokens for text in found.caches[0].texts]
    columns = [("KV cache", "left"), ("bytes/token", "right"), ("tokens/GiB", "right")]
    table = _table(lines, *columns, *((f"{tokens:,} tokens", "right") for tokens in lengths))
    for cost in found.caches:
        held = [_bytes(text.bytes) for text in cost.texts]
        table.add_row(
            _name(cost), f"{cost.bytes_per_token:,.0f}", f"{cost.tokens_per_gib:,}", *held
        )
    if found.model.windows:
        _add_without_windows(table, found.caches)
    yield table
    yield Text(
        f"* is what was asked for. Pages of {found.page_size} tokens, keys and values of all layers."
    )
    if found.model.windows:
        yield Text(
            f"A layer with a window keeps its tokens and those of one dispatch, up to {found.max_tokens_per_dispatch:,}. Bytes per token are the "
            f"average over a text of {found.max_model_len:,}."
        )


def _add_without_windows(table: Table, caches: Sequence[CacheCost]) -> None:
    """What the same texts would take if every layer kept everything, and the share of it that they do take."""
    table.add_section()
    table.add_row("without windows:", style="dim")
    for cost in caches:
        per_token = cost.bytes_per_token_without_windows
        full = [_bytes(text.bytes_without_windows) for text in cost.texts]
        table.add_row(
            _name(cost), f"{per_token:,.0f}", f"{int(GIB / per_token):,}", *full, style="dim"
        )
    table.add_row("windows leave", "", "", *(f"{text.ratio:.0%}" for text in caches[0].texts))


# -- the scales ---------------------------------------------------------------------------------------------------------


def _layers_scales(scales: Scales, lines: box.Box | None) -> Iterator[RenderableType]:
    """A row for each layer, what belongs to none, and what there is to say beside."""
    if scales.rows:
        yield from [] if lines else [""]
        offsets = any(row.k_offset for row in scales.rows)
        names = [
            "K scale",
            "V scale",
            *(["K offset"] if offsets else []),
            "from",
            "one per",
            "verdict",
        ]
        table = _table(lines, ("layer", "right"), *((name, "left") for name in names))
        for row in scales.rows:
            numbers = [row.k, row.v, *([row.k_offset] if offsets else [])]
            origin = [", ".join(row.sources) or "-", row.granularity or "-", row.verdict]
            table.add_row(f"{row.layer}", *map(words, numbers), *origin)
        yield table
    told = [
        *(p for p in scales.problems if not p.startswith("layer ")),
        *(f"Note: {note}" for note in scales.notes),
    ]
    if scales.problems:
        told.append(
            "Strict loading refuses these scales; strict=False, or --no-strict, goes on as the verdicts say."
        )
    yield from ([""] if told and not (lines and scales.rows) else [])
    yield from map(Text, told)


def _name(cost: CacheCost) -> str:
    return f"{cost.kv_dtype}{'' if cost.scales == 'static' else ' ' + cost.scales}{' *' if cost.asked else ''}"


def _table(lines: box.Box | None, *columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=lines, header_style="bold", pad_edge=False)
    for name, side in columns:
        table.add_column(
            name, justify=side, overflow="fold"
        )  # a name that is too long is told whole
    return table


def _bytes(count: int) -> str:
    """Three digits and a binary unit."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.{0 if units[0] == 'bytes' or size >= 100 else 1}f} {units[0]}"
