"""A model's weights with what they need to be used: the config, the tokenizer and the KV scales found beside them.

`Params` is a pytree whose leaves are the weights and nothing else, so `jax.tree.map`, `jax.jit` and `jax.device_put`
treat it like the dict inside. `Params.from_pytree` takes the trees people already hold: our own layout, an NNX module
or state, Hugging Face names, or a Flax tree with `kernel`, `embedding` and `scale` leaves.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.layouts import bare, hf_modules, is_buffer
from jfp8kv.models.names import (
    Shape,
    Source,
    each_source,
    expected_shapes,
    nest,
    require_names,
    require_shape,
    sources,
)
from jfp8kv.text.tokenizer import as_tokenizer

_WHERE = "the given tree"


class _Same:
    """Static pytree data compared by identity: tokenizers and scales have no equality that is worth a recompilation."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Params:
    """The weights of one model (the leaves) and what is static about it.

    Attributes:
      tree: nested dict of arrays; linear weights are `[out, in]`, those of `layers` stacked to `[layers, out, in]`.
        RoPE is the half-split layout. `head` is absent when the output is tied to the embeddings.
      config: the `ModelConfig` that every shape in `tree` agrees with.
      tokenizer: a `Tokenizer`, or None: prompts must then be token ids.
      kv_scales: the scales found in the checkpoint, or None.
    """

    tree: dict[str, Any]
    config: ModelConfig
    tokenizer: Any = None
    kv_scales: Any = None

    @classmethod
    def from_pytree(cls, tree: Any, config: Any, tokenizer: Any = None) -> "Params":
        """Wrap weights the caller already holds, after checking every name and shape.

        Args:
          tree: one of: the nested dict of `Params.tree`; an `nnx.Module` or `nnx.State` with those names; a flat or
            nested mapping with Hugging Face names, with or without the leading "model."; a Flax tree with Hugging
            Face module names, whose `kernel` leaves are `[in, out]` and are transposed. Arrays already on a device
            are not copied, except to stack layers that come one by one.
          config: a `ModelConfig`, a dict as in `config.json`, or a transformers config.
          tokenizer: None, a `Tokenizer`, a transformers or `tokenizers` one, or anything with `encode` and `decode`.

        Raises:
          CheckpointError: a parameter missing, unexpected, of the wrong shape or not floating point.
          ConfigError: a config or tokenizer that cannot be read.
        """
        config = _config(config)
        flat = _flatten(tree)
        ours = any(name.startswith(("embed.", "layers.q.")) for name in flat)
        native = _checked(flat, expected_shapes(config)) if ours else _from_hf_names(flat, config)
        return cls(nest(native), config, as_tokenizer(tokenizer, eos_ids=config.eos_ids))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights, read off the embeddings."""
        return np.dtype(self.tree["embed"]["weight"].dtype)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the config's, or else the tokenizer's."""
        return tuple(self.config.eos_ids or getattr(self.tokenizer, "eos_ids", ()))

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.tree))

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
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
            f"Params({self.config.architecture}, {_human(self.size)} parameters, {_human(self.nbytes)}B, {self.dtype}, "
            f"tokenizer={'yes' if self.tokenizer is not None else 'no'})"
        )

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        static = (self.config, _Same(self.tokenizer), _Same(self.kv_scales))
        return [(jax.tree_util.GetAttrKey("tree"), self.tree)], static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Params":
        config, tokenizer, kv_scales = static
        (tree,) = children
        return cls(tree, config, tokenizer.value, kv_scales.value)


def _config(config: Any) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"config of type {type(config).__name__}: must be a ModelConfig, a dict as in config.json, or a "
            "transformers config."
        )
    return config_from_hf(config)


def _flatten(tree: Any) -> dict[str, Any]:
    """Dotted name -> array, from nested or flat mappings, lists, tuple keys, NNX modules and states."""
    flat: dict[str, Any] = {}

    def walk(path: tuple[str, ...], node: Any) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                walk(
                    (
                        *path,
                        *(
                            map(str, key)
                            if isinstance(key, tuple)
                            else [str(key).replace("/", ".")]
                        ),
                    ),
                    child,
                )
        elif isinstance(node, list | tuple):
            for index, child in enumerate(node):
                walk((*path, str(index)), child)
        elif node is not None:
            flat[".".join(path)] = node

    walk((), _plain(tree))
    if not flat:
        raise CheckpointError(f"{_WHERE} of type {type(tree).__name__} holds no arrays.")
    for name, leaf in flat.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(f"{_WHERE}: {name} is a {type(leaf).__name__}, not an array.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise CheckpointError(
                f"{_WHERE}: {name} is of dtype {leaf.dtype}; weights must be floating point."
            )
    return {name.removeprefix("params."): leaf for name, leaf in flat.items()}


def _plain(tree: Any) -> Any:
    """NNX modules and states as nested dicts of arrays; anything else as it is."""
    if isinstance(tree, Mapping | list | tuple) and type(tree).__module__ == "builtins":
        return tree
    from flax import nnx

    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    elif isinstance(tree, nnx.State) and (parameters := nnx.filter_state(tree, nnx.Param)):
        tree = parameters
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _from_hf_names(flat: Mapping[str, Any], config: ModelConfig) -> dict[str, jax.Array]:
    theirs = dict(_hf_name(name, leaf) for name, leaf in flat.items() if not is_buffer(name))
    if config.tied_embeddings:
        theirs.pop(
            "lm_head.weight", None
        )  # a copy of the embeddings that Hugging Face state dicts list again
    found = sources(config, hf_modules(config, theirs))
    theirs = _checked(theirs, each_source(found))
    shapes = expected_shapes(config)
    return {ours: _parameter(shapes[ours], parts, theirs) for ours, parts in found.items()}


def _parameter(shape: Shape, parts: list[Source], theirs: Mapping[str, jax.Array]) -> jax.Array:
    taken = [
        theirs[part.name] if part.take is None else part.take(theirs[part.name]) for part in parts
    ]
    return taken[0] if shape == parts[0].part else jnp.stack(taken).reshape(shape)


def _hf_name(name: str, leaf: Any) -> tuple[str, Any]:
    """One leaf under its bare Hugging Face name, a Flax `kernel` turned to `[out, in]`."""
    *path, kind = bare(name).split(".")
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
