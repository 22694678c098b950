"""A model's weights under Hugging Face's names and in its layout: `load` backwards.

The layouts (models/layouts.py) say what part of which tensor each parameter takes. A part is a view, so writing into it is
taking it the other way round: fused and transposed tensors need no rule of their own. A tensor is put together when it is
written, from parameters that stay where they are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jfp8kv.checkpoint.safetensors import NewTensor
from jfp8kv.checkpoint.tensors import FLOATS
from jfp8kv.core.errors import ConfigError
from jfp8kv.models.layouts import full_name, hf_modules
from jfp8kv.models.names import (
    Shape,
    Source,
    expected_shapes,
    require_names,
    require_shape,
    sources,
)
from jfp8kv.models.params import Params

_WHERE = "params"


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one parameter gives to a tensor: `leaf[at]`, which goes where `source` says."""

    leaf: Any
    at: tuple[int, ...]
    source: Source

    def values(self) -> np.ndarray:
        on_host = isinstance(self.leaf, np.ndarray) or all(
            device.platform == "cpu" for device in self.leaf.devices()
        )
        return np.asarray(self.leaf)[self.at] if on_host else np.asarray(self.leaf[self.at])


def hf_weights(params: Params) -> list[NewTensor]:
    """Every tensor of the model's weights, of the dtype that its parameters have. Nothing is read yet.

    Raises:
      CheckpointError: a parameter missing, unexpected or of the wrong shape.
      ConfigError: one that is not an array of floating-point numbers that checkpoints have.
    """
    config = params.config
    shapes, leaves = expected_shapes(config), _leaves(params.tree)
    require_names(leaves, shapes, where=_WHERE)
    parts: dict[str, list[_Part]] = {}
    for ours, found in sources(config, hf_modules(config, ())).items():
        _require_array(ours, leaves[ours], shapes[ours])
        stacked = shapes[ours][: len(shapes[ours]) - len(found[0].part)]
        for at, source in zip(np.ndindex(stacked), found, strict=True):
            parts.setdefault(source.name, []).append(_Part(leaves[ours], at, source))
    return [_tensor(full_name(config, name), each) for name, each in parts.items()]


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in named}


def _require_array(name: str, leaf: Any, shape: Shape) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray) or leaf.dtype not in FLOATS.values():
        kind = (
            f"of dtype {leaf.dtype}"
            if isinstance(leaf, jax.Array | np.ndarray)
            else f"a {type(leaf).__name__}"
        )
        raise ConfigError(f"{_WHERE}: {name} is {kind}: must be an array of {', '.join(FLOATS)}.")
    require_shape(name, leaf.shape, shape, where=_WHERE)


def _tensor(name: str, parts: Sequence[_Part]) -> NewTensor:
    dtypes = {np.dtype(part.leaf.dtype) for part in parts}
    dtype = (
        dtypes.pop() if len(dtypes) == 1 else FLOATS["float32"]
    )  # fused ones of several types: what holds them all
    return NewTensor(name, parts[0].source.shape, dtype, partial(_joined, parts, dtype))


def _joined(parts: Sequence[_Part], dtype: np.dtype) -> np.ndarray:
    if parts[0].source.take is None:
        return parts[0].values()
    out = np.empty(parts[0].source.shape, dtype)
    for part in parts:
        view = part.source.take(out)
        assert np.shares_memory(view, out), "a Hugging Face layout takes parts as they are"
        view[...] = part.values()
    return out
