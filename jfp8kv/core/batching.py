"""What functions written for one request share when they batch themselves under `vmap` (`jax.custom_batching.custom_vmap`)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def with_axis(size: int, batched: Sequence[bool], args: Sequence[jax.Array]) -> list[jax.Array]:
    """The arguments that `def_vmap` is given, each with the axis of requests: those without one are alike for all."""
    return [
        x if own else jnp.broadcast_to(x, (size, *x.shape))
        for x, own in zip(args, batched, strict=True)
    ]
