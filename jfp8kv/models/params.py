"""The weights of a model, with its config, its tokenizer and the KV scales of its checkpoint.

`Params` is a pytree whose leaves are the weights only, so `jax.tree.map`, `jax.jit` and
`jax.device_put` treat it like the dict inside. `Params.from_pytree` accepts other trees: the native
layout, an NNX module or state, Hugging Face names, or a Flax tree with `kernel`, `embedding` and
`scale` leaves.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.layouts import hf_modules, is_buffer, strip_prefix
from jfp8kv.models.names import (
    Shape,
    TensorSource,
    expected_shapes,
    require_names,
    require_shape,
    source_shapes,
    tensor_sources,
    unflatten,
)
from jfp8kv.models.saved_names import check_saved_names
from jfp8kv.text.tokenizer import Tokenizer, as_tokenizer

_WHERE = "the given tree"


@runtime_checkable
class HFConfig(Protocol):
    """A config of the transformers library."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of config.json."""


if TYPE_CHECKING:
    ConfigLike: TypeAlias = ModelConfig | Mapping[str, Any] | HFConfig
else:
    ConfigLike = (
        object  # other types raise a `ConfigError`, not an error of a run-time type checker
    )
"""A `ModelConfig`, a dict as in config.json, or a transformers config."""


class _ById:
    """Static pytree data that is compared by identity.

    Tokenizers and KV scales are large, and comparing their contents at each call would be slow.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Params:
    """The weights of one model as a pytree, with static data. `load` and `from_pytree` return it.

    Attributes:
      tree: nested dict of arrays. Linear weights are `[out, in]`, those of `layers` are stacked to
        `[layers, out, in]`. RoPE has the half-split layout. `head` is absent if the output is tied
        to the embeddings.
      config: the `ModelConfig`; every shape in `tree` agrees with it.
      tokenizer: a `Tokenizer`; None if prompts must be token ids.
      kv_scales: the `KVScales` found in the checkpoint, or None.

    Example:
      params = jfp8kv.load("path")
      half = jax.tree.map(lambda w: w.astype(jnp.float16), params)
    """

    tree: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    kv_scales: Any = None  # a `KVScales`, which models do not import

    @classmethod
    def from_pytree(cls, tree: object, config: ConfigLike, tokenizer: object = None) -> "Params":
        """Wrap weights in memory, after checking all names and shapes.

        Args:
          tree: one of: the nested dict of `Params.tree`; an `nnx.Module` or `nnx.State` with those
            names; a flat or nested mapping with Hugging Face names, with or without the leading
            "model."; a Flax tree with Hugging Face module names, whose `kernel` leaves are
            `[in, out]` and are transposed. Arrays on a device are not copied, except to stack
            separate layers.
          config: a `ModelConfig`, a dict as in `config.json`, or a transformers config.
          tokenizer: None, a `Tokenizer`, one of transformers or `tokenizers`, or any object with
            `encode` and `decode`.

        Raises:
          CheckpointError: a parameter is missing, unexpected, of the wrong shape or not floating
            point.
          ConfigError: an invalid config or tokenizer.

        Example:
          params = jfp8kv.Params.from_pytree(nnx_model, hf_config, tokenizer)
        """
        config = _as_model_config(config)
        flat = _flatten(tree)
        is_native = any(name.startswith(("embed.", "layers.q.")) for name in flat)
        if is_native:
            native = _checked(flat, expected_shapes(config))
        else:
            native = _from_hf_names(flat, config)
        return cls(unflatten(native), config, as_tokenizer(tokenizer))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights: that of the embeddings."""
        return np.dtype(self.tree["embed"]["weight"].dtype)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens of config and tokenizer that are in the vocabulary."""
        listed = [*self.config.eos_ids, *getattr(self.tokenizer, "eos_ids", ())]
        return tuple(token for token in dict.fromkeys(listed) if 0 <= token < self.config.vocab)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.tree))

    @property
    def nbytes(self) -> int:
        """The size of the parameters in bytes."""
        return sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.tree)
        )

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.tree)
        if not leaves or not all(
            hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves
        ):
            return f"Params({self.config.architecture})"
        return (
            f"Params({self.config.architecture}, {_human(self.size)} parameters, "
            f"{_human(self.nbytes)}B, {self.dtype}, "
            f"tokenizer={'yes' if self.tokenizer is not None else 'no'})"
        )

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        static = (self.config, _ById(self.tokenizer), _ById(self.kv_scales))
        return [(jax.tree_util.GetAttrKey("tree"), self.tree)], static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Params":
        config, tokenizer, kv_scales = static
        (tree,) = children
        return cls(tree, config, tokenizer.value, kv_scales.value)


def _as_model_config(config: ConfigLike) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, HFConfig):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"config of type {type(config).__name__}: must be a ModelConfig, a dict as in "
            "config.json, or a transformers config."
        )
    return config_from_hf(config)


def _flatten(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree by dotted name.

    The tree may be nested or flat, with lists and tuple keys, or an NNX module or state.
    """
    flat: dict[str, Any] = {}

    def walk(path: tuple[str, ...], node: Any) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                parts = map(str, key) if isinstance(key, tuple) else [str(key).replace("/", ".")]
                walk((*path, *parts), child)
        elif isinstance(node, list | tuple):
            for index, child in enumerate(node):
                walk((*path, str(index)), child)
        elif node is not None:
            flat[".".join(path)] = node

    walk((), _as_dict(tree))
    if not flat:
        raise CheckpointError(f"{_WHERE} of type {type(tree).__name__} contains no arrays.")
    check_saved_names(flat, where=_WHERE)
    for name, leaf in flat.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(
                f"{_WHERE}: {name} is of type {type(leaf).__name__}, not an array."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise CheckpointError(
                f"{_WHERE}: {name} is of dtype {leaf.dtype}: weights must be floating point."
            )
    return {name.removeprefix("params."): leaf for name, leaf in flat.items()}


def _as_dict(tree: Any) -> Any:
    """Return NNX modules and states as nested dicts of arrays, anything else unchanged."""
    if isinstance(tree, Mapping | list | tuple) and type(tree).__module__ == "builtins":
        return tree
    from flax import nnx

    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    elif isinstance(tree, nnx.State) and (parameters := nnx.filter_state(tree, nnx.Param)):
        tree = parameters
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _from_hf_names(flat: Mapping[str, Any], config: ModelConfig) -> dict[str, jax.Array]:
    leaves = dict(_hf_leaf(name, leaf) for name, leaf in flat.items() if not is_buffer(name))
    if config.tied_embeddings:
        # Hugging Face state dicts list the embeddings twice.
        leaves.pop("lm_head.weight", None)
    sources = tensor_sources(config, hf_modules(config, leaves))
    tensors = _checked(leaves, source_shapes(sources))
    shapes = expected_shapes(config)
    return {name: _parameter(shapes[name], parts, tensors) for name, parts in sources.items()}


def _parameter(
    shape: Shape, parts: list[TensorSource], tensors: Mapping[str, jax.Array]
) -> jax.Array:
    arrays = [
        tensors[part.name] if part.extract is None else part.extract(tensors[part.name])
        for part in parts
    ]
    return arrays[0] if shape == parts[0].part else jnp.stack(arrays).reshape(shape)


def _hf_leaf(name: str, leaf: Any) -> tuple[str, Any]:
    """Return a leaf and its Hugging Face name without prefix; a Flax `kernel` is transposed."""
    *path, kind = strip_prefix(name).split(".")
    if kind == "kernel":
        leaf = leaf.T
    return ".".join([*path, "weight" if kind in ("kernel", "embedding", "scale") else kind]), leaf


def _checked(flat: Mapping[str, Any], expected: Mapping[str, Shape]) -> dict[str, jax.Array]:
    require_names(flat, expected, where=_WHERE)
    for name, shape in expected.items():
        require_shape(name, flat[name].shape, shape, where=_WHERE)
    return {name: jnp.asarray(flat[name]) for name in expected}


def _human(number: int) -> str:
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {letter}"
    return str(number)
