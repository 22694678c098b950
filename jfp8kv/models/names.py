"""The name and shape of every parameter of ours, and where checkpoints keep it.

`expected_shapes` is the one place that says which parameters a `ModelConfig` has. Our tree is small because the layers are
stacked: `layers.q.weight` holds the query projection of every layer, `[layers, out, in]`. Files name each layer's tensor by
itself, fuse several into one or store them transposed; a `Module` (models/layouts.py lists them) says how, and `sources` turns
that into the tensors to read and the part of each to take.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig

Shape = tuple[int, ...]
LAYERS, EXPERTS = "layers.", "layers.experts."
EACH_EXPERT = tuple(
    f"{EXPERTS}{name}" for name in ("gate", "up", "down")
)  # one matrix for every expert of a layer


@dataclasses.dataclass(frozen=True)
class Module:
    """How a checkpoint keeps one module of ours.

    Args:
      path: the module's name there, `{layer}` and `{expert}` filled in; without `{expert}`, all of them are one tensor.
      fused: the modules of ours that share this tensor, in order of their rows (`layers.` left out); () is a tensor of its own.
      interleaved: the fused modules' rows take turns instead of following each other.
      transposed: stored `[in, out]`.
      leaves: what follows `path` for our `weight` and `bias`.
      heads: rows are kept in pairs for interleaved RoPE, in so many heads, and are put back into halves.
      offset: added to every value read, before it is rounded to the parameter's type.
    """

    path: str
    fused: tuple[str, ...] = ()
    interleaved: bool = False
    transposed: bool = False
    leaves: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"weight": ".weight", "bias": ".bias"}
    )
    heads: int = 0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor of theirs, of `shape`, and what one layer (and expert) of a parameter takes of it: an array of shape `part`.

    `take` works on NumPy and JAX arrays alike; None takes the tensor as it is. Where it computes (`wide`) it wants float32.
    """

    name: str
    shape: Shape
    part: Shape
    take: Callable[[Any], Any] | None = None
    wide: bool = False


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Native name -> shape of every parameter of a model: weights `[out, in]`, `layers.*` stacked on a leading axis."""
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
    q, kv, dense = c.q_heads * c.head_dim, c.kv_heads * c.head_dim, len(c.dense_layers)
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
    if (e := c.experts) is None:
        return
    layers, shared = len(e.layers), e.shared_hidden
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


def sources(config: ModelConfig, modules: Mapping[str, Module]) -> dict[str, list[Source]]:
    """For each native parameter the tensors it is read from, layer by layer and expert by expert.

    The parts follow each other along the parameter's leading axes: reshaped to `[parts, *part]` it is filled in this order.
    """
    shapes = expected_shapes(config)
    return {ours: list(_sources(ours, shapes, config, modules)) for ours in shapes}


def _sources(
    ours: str, shapes: Mapping[str, Shape], c: ModelConfig, modules: Mapping[str, Module]
) -> Iterator[Source]:
    module, _, leaf = ours.rpartition(".") if ours not in modules else (ours, "", "")
    theirs = modules[module]
    suffix = theirs.leaves[leaf] if leaf else ""
    if not ours.startswith(LAYERS):
        yield _source(theirs, theirs.path + suffix, ours, leaf, shapes[ours], shapes)
        return
    apart = module in EACH_EXPERT and "{expert}" in theirs.path
    shape = shapes[ours][2 if apart else 1 :]
    for layer in _layers_of(module, c):
        for expert in range(shapes[ours][1] if apart else 1):
            name = theirs.path.format(layer=layer, expert=expert) + suffix
            yield _source(theirs, name, ours, leaf, shape, shapes)


def _layers_of(module: str, c: ModelConfig) -> tuple[int, ...]:
    if c.experts is not None and module.startswith(EXPERTS):
        return c.experts.layers
    return (
        c.dense_layers
        if module in ("layers.gate", "layers.up", "layers.down")
        else tuple(range(c.layers))
    )


def _source(
    module: Module, name: str, ours: str, leaf: str, shape: Shape, shapes: Mapping[str, Shape]
) -> Source:
    matrix = leaf == "weight" and len(shape) > 1
    theirs, axis, part = list(shape), -2 if matrix else -1, None
    if module.fused:
        widths = {other: shapes[f"{LAYERS}{other}.{leaf}"][axis] for other in module.fused}
        theirs[axis], part = (
            sum(widths.values()),
            _part(module, ours.removeprefix(LAYERS).rpartition(".")[0], widths),
        )
    if matrix and module.transposed:
        theirs[-2:] = theirs[:-3:-1]
    if (
        part is None
        and not (matrix and module.transposed)
        and not module.heads
        and not module.offset
    ):
        return Source(name, shape, shape)

    def take(x: Any) -> Any:
        x = x.swapaxes(-1, -2) if matrix and module.transposed else x
        x = x if part is None else (x[..., part, :] if matrix else x[..., part])
        x = _halves(x, module.heads) if module.heads else x
        return x + np.asarray(module.offset, x.dtype) if module.offset else x

    return Source(name, tuple(theirs), shape, take, wide=bool(module.offset))


def _part(module: Module, ours: str, widths: Mapping[str, int]) -> slice:
    place = module.fused.index(ours)
    if module.interleaved:
        return slice(place, None, len(module.fused))
    start = sum(list(widths.values())[:place])
    return slice(start, start + widths[ours])


def _halves(x: Any, heads: int) -> Any:
    """A head's rows 0, half, 1, half + 1, ... as 0, 1, ..., half, ..."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def each_source(found: Mapping[str, list[Source]]) -> dict[str, Shape]:
    """Name and shape of every tensor that is read, each once."""
    return {source.name: source.shape for parts in found.values() for source in parts}


def require_names(found: Collection[str], expected: Mapping[str, Shape], *, where: str) -> None:
    """Check that `found` is exactly the names of `expected`.

    Raises:
      CheckpointError: names the first missing or unexpected parameters, and the shape a missing one should have.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    if missing:
        hint = ""
        if all(name.startswith(("head.", "lm_head.", "output.")) for name in missing):
            hint = " If the model ties its output to its embeddings, its config must say so (tie_word_embeddings)."
        raise CheckpointError(f"{where}: {_some(missing, 'missing')}.{hint}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        hint = ""
        if any(name.endswith((".bias", "lm_head.weight", "head.weight")) for name in unexpected):
            hint = " Biases and an output head are read when the config declares them."
        raise CheckpointError(
            f"{where}: {_some(unexpected, 'not part of this architecture')}.{hint}"
        )


def require_shape(name: str, found: Shape, expected: Shape, *, where: str) -> None:
    """Raise a `CheckpointError` naming the parameter and both shapes unless they agree."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{where}: {name} has shape {list(found)}, expected {list(expected)} by the model's config."
        )


def nest(flat: Mapping[str, object]) -> dict:
    """`{"a.b": x}` -> `{"a": {"b": x}}`."""
    tree: dict = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def _some(names: list[str], what: str) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} {what}: {shown}"
