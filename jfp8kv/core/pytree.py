"""Frozen dataclasses that are JAX pytrees, and the axis that `vmap` adds to their arrays."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    AnyArray: TypeAlias = Any
else:
    AnyArray = jax.Array | np.ndarray
"""An array that the host builds with NumPy and a jitted function receives as a JAX array."""

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Declare a dataclass field as part of the tree structure: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and register it as a pytree; leaves are the non-static fields.

    JAX rebuilds a node around whatever a transformation puts in place of the leaves: shapes, axis
    numbers, None, arrays with a batch axis. So rebuilding bypasses `__init__`, whose annotations
    and `__post_init__` describe real values.

    Example:
      @pytree
      class Point:
          x: Array
          name: str = static(default="")
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in data]

    def flatten(node: T) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, name) for name in data], tuple(getattr(node, name) for name in meta)

    def flatten_with_keys(node: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        leaves, aux = flatten(node)
        return list(zip(keys, leaves, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], leaves: Iterable[Any]) -> T:
        node = object.__new__(cls)
        node.__dict__.update(zip(meta, aux, strict=True))
        node.__dict__.update(zip(data, leaves, strict=True))
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def broadcast_unbatched(
    size: int, batched: Sequence[bool], args: Sequence[jax.Array]
) -> list[jax.Array]:
    """Give every argument of a `custom_vmap` rule the batch axis.

    Args:
      size: length of the batch axis.
      batched: for each argument, whether it has the axis already.
      args: the arguments; the others are broadcast.
    """
    return [
        x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
        for x, has_axis in zip(args, batched, strict=True)
    ]
