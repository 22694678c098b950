"""Names and shapes of all parameters, and where checkpoints store them.

`expected_shapes` defines which parameters a `ModelConfig` has. The native tree is small because the
layers are stacked: `layers.q.weight` is the query projection of every layer, `[layers, out, in]`.
Files have one tensor per layer, fuse several into one, or store them transposed. A `ModuleLayout`
(models/layouts.py lists them) describes that, and `tensor_sources` turns it into the tensors to
read and the part of each to extract.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig

Shape = tuple[int, ...]
LAYERS = "layers."
EXPERTS = "layers.experts."
# Modules with one matrix per expert of a layer.
EACH_EXPERT = tuple(f"{EXPERTS}{name}" for name in ("gate", "up", "down"))


@dataclasses.dataclass(frozen=True)
class ModuleLayout:
    """How a checkpoint stores one native module.

    Attributes:
      path: name of the module in the checkpoint, a format string of `{layer}` and `{expert}`.
        Without `{expert}` all experts are one tensor.
      fused: the native modules that share this tensor, in the order of their rows, without
        "layers."; () for a separate tensor.
      interleaved: whether the rows of the fused modules alternate.
      transposed: whether matrices are stored as `[in, out]`.
      suffixes: what follows `path` for the native `weight` and `bias`.
      heads: the number of heads whose rows are in pairs for interleaved RoPE and must be converted
        to halves; 0 for none.
      offset: added to every value, before it is rounded to the type of the parameter.
    """

    path: str
    fused: tuple[str, ...] = ()
    interleaved: bool = False
    transposed: bool = False
    suffixes: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"weight": ".weight", "bias": ".bias"}
    )
    heads: int = 0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The checkpoint tensor of one layer (and expert) of a parameter.

    Attributes:
      name: of the tensor.
      shape: of the tensor.
      part: shape of the extracted part.
      extract: returns the part, of a NumPy or JAX array; None for the whole tensor.
      needs_float32: whether `extract` computes, so that its argument must be float32.
    """

    name: str
    shape: Shape
    part: Shape
    extract: Callable[[Any], Any] | None = None
    needs_float32: bool = False


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter of a model, by native name.

    Weights are `[out, in]`; `layers.*` are stacked on a leading axis.
    """
    c = config
    shapes: dict[str, Shape] = {"embed.weight": (c.vocab, c.hidden)}
    if c.learned_positions:
        shapes["positions.weight"] = (c.max_len, c.hidden)
    shapes |= {f"{LAYERS}{name}": shape for name, shape in (*_norms(c), *_linears(c), *_experts(c))}
    if c.sinks:
        shapes["layers.sinks"] = (c.layers, c.q_heads)
    shapes["norm.weight"] = (c.hidden,)
    if c.norm == "layer":
        shapes["norm.bias"] = (c.hidden,)
    if not c.tied_embeddings:
        shapes["head.weight"] = (c.vocab, c.hidden)
    return shapes


def _norms(c: ModelConfig) -> Iterator[tuple[str, Shape]]:
    widths: dict[str, int] = {}
    if c.pre_norm:
        widths |= {"attention_norm": c.hidden, "mlp_norm": c.hidden}
    if c.post_norm:
        widths |= {"attention_post_norm": c.hidden, "mlp_post_norm": c.hidden}
    if c.qk_norm:
        q, k = (1, 1) if c.qk_norm == "head" else (c.q_heads, c.kv_heads)
        widths |= {"q_norm": q * c.head_dim, "k_norm": k * c.head_dim}
    for name, width in widths.items():
        yield f"{name}.weight", (c.layers, width)
        if c.norm == "layer":
            yield f"{name}.bias", (c.layers, width)


def _linears(c: ModelConfig) -> Iterator[tuple[str, Shape]]:
    q = c.q_heads * c.head_dim
    kv = c.kv_heads * c.head_dim
    dense = len(c.dense_layers)
    linears = {
        "q": (c.layers, q, c.hidden, c.qkv_bias),
        "k": (c.layers, kv, c.hidden, c.qkv_bias),
        "v": (c.layers, kv, c.hidden, c.qkv_bias),
        "o": (c.layers, c.hidden, q, c.o_bias),
        "gate": (dense if c.gated_mlp else 0, c.mlp_hidden, c.hidden, c.mlp_bias),
        "up": (dense, c.mlp_hidden, c.hidden, c.mlp_bias),
        "down": (dense, c.hidden, c.mlp_hidden, c.mlp_bias),
    }
    for name, (layers, out, into, bias) in linears.items():
        if layers:
            yield f"{name}.weight", (layers, out, into)
        if layers and bias:
            yield f"{name}.bias", (layers, out)


def _experts(c: ModelConfig) -> Iterator[tuple[str, Shape]]:
    e = c.experts
    if e is None:
        return
    layers = len(e.layers)
    shared = e.shared_hidden
    linears = {
        "router": ((layers, e.count, c.hidden), e.bias),
        "gate": ((layers, e.count, e.hidden, c.hidden), e.bias),
        "up": ((layers, e.count, e.hidden, c.hidden), e.bias),
        "down": ((layers, e.count, c.hidden, e.hidden), e.bias),
    }
    if shared:
        linears |= {
            "shared_gate": ((layers, shared, c.hidden), False),
            "shared_up": ((layers, shared, c.hidden), False),
            "shared_down": ((layers, c.hidden, shared), False),
            "shared_switch": ((layers, 1, c.hidden), False),
        }
    for name, (shape, bias) in linears.items():
        yield f"experts.{name}.weight", shape
        if bias:
            yield f"experts.{name}.bias", shape[:-1]


def tensor_sources(
    config: ModelConfig, modules: Mapping[str, ModuleLayout]
) -> dict[str, list[TensorSource]]:
    """Return the tensors that each native parameter is read from, in the order of its parts.

    The parts are the layers, or the experts of all layers: a parameter that is reshaped to
    `[parts, *part]` has one row per tensor.
    """
    shapes = expected_shapes(config)
    return {name: list(_sources(name, shapes, config, modules)) for name in shapes}


def _sources(
    native: str, shapes: Mapping[str, Shape], c: ModelConfig, modules: Mapping[str, ModuleLayout]
) -> Iterator[TensorSource]:
    if native in modules:
        module = native
        leaf = ""
    else:
        module, _, leaf = native.rpartition(".")
    layout = modules[module]
    suffix = layout.suffixes[leaf] if leaf else ""
    if not native.startswith(LAYERS):
        yield _source(layout, layout.path + suffix, native, leaf, shapes[native], shapes)
        return
    by_expert = module in EACH_EXPERT and "{expert}" in layout.path
    shape = shapes[native][2 if by_expert else 1 :]
    for layer in _layers_of(module, c):
        for expert in range(shapes[native][1] if by_expert else 1):
            name = layout.path.format(layer=layer, expert=expert) + suffix
            yield _source(layout, name, native, leaf, shape, shapes)


def _layers_of(module: str, c: ModelConfig) -> tuple[int, ...]:
    if c.experts is not None and module.startswith(EXPERTS):
        return c.experts.layers
    if module in ("layers.gate", "layers.up", "layers.down"):
        return c.dense_layers
    return tuple(range(c.layers))


def _source(
    layout: ModuleLayout,
    name: str,
    native: str,
    leaf: str,
    shape: Shape,
    shapes: Mapping[str, Shape],
) -> TensorSource:
    is_matrix = leaf == "weight" and len(shape) > 1
    is_transposed = is_matrix and layout.transposed
    stored = list(shape)
    rows: slice | None = None
    if layout.fused:
        axis = -2 if is_matrix else -1
        widths = {other: shapes[f"{LAYERS}{other}.{leaf}"][axis] for other in layout.fused}
        stored[axis] = sum(widths.values())
        rows = _fused_rows(layout, native.removeprefix(LAYERS).rpartition(".")[0], widths)
    if is_transposed:
        stored[-2:] = stored[:-3:-1]
    if rows is None and not is_transposed and not layout.heads and not layout.offset:
        return TensorSource(name, shape, shape)

    def extract(x: Any) -> Any:
        if is_transposed:
            x = x.swapaxes(-1, -2)
        if rows is not None:
            x = x[..., rows, :] if is_matrix else x[..., rows]
        if layout.heads:
            x = _pairs_to_halves(x, layout.heads)
        if layout.offset:
            x = x + np.asarray(layout.offset, x.dtype)
        return x

    return TensorSource(name, tuple(stored), shape, extract, needs_float32=bool(layout.offset))


def _fused_rows(layout: ModuleLayout, native: str, widths: Mapping[str, int]) -> slice:
    """Return the rows of one module in a fused tensor."""
    index = layout.fused.index(native)
    if layout.interleaved:
        return slice(index, None, len(layout.fused))
    start = sum(list(widths.values())[:index])
    return slice(start, start + widths[native])


def _pairs_to_halves(x: Any, heads: int) -> Any:
    """Reorder the rows 0, half, 1, half + 1, ... of each head to 0, 1, ..., half, ..."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def source_shapes(sources: Mapping[str, list[TensorSource]]) -> dict[str, Shape]:
    """Return the shape of every tensor that is read, by name."""
    return {source.name: source.shape for parts in sources.values() for source in parts}


def require_names(found: Collection[str], expected: Mapping[str, Shape], *, where: str) -> None:
    """Raise `CheckpointError` unless `found` has exactly the names of `expected`.

    The message lists the first missing names with their shapes, or the first unexpected names.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    if missing:
        hint = ""
        if all(name.startswith(("head.", "lm_head.", "output.")) for name in missing):
            hint = (
                " If the output is tied to the embeddings, the config must say so "
                "(tie_word_embeddings)."
            )
        raise CheckpointError(f"{where}: {_first_names(missing, 'missing')}.{hint}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        hint = ""
        if any(name.endswith((".bias", "lm_head.weight", "head.weight")) for name in unexpected):
            hint = " Biases and an output head are read when the config declares them."
        raise CheckpointError(
            f"{where}: {_first_names(unexpected, 'not part of this architecture')}.{hint}"
        )


def require_shape(name: str, found: Shape, expected: Shape, *, where: str) -> None:
    """Raise `CheckpointError`, with the name and both shapes, unless the shapes agree."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{where}: {name} has shape {list(found)}, expected {list(expected)} by the config of "
            "the model."
        )


def unflatten(flat: Mapping[str, object]) -> dict[str, Any]:
    """Return `{"a": {"b": x}}` for `{"a.b": x}`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def _first_names(names: list[str], problem: str) -> str:
    """Return the problem of some parameters with the first four names, for an error message."""
    shown = ", ".join(names[:4])
    if len(names) > 4:
        shown += f" and {len(names) - 4} more"
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} {problem}: {shown}"
