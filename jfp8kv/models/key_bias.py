"""The constant part of a model's keys: what its weights say of it, and what RoPE leaves of it.

A bias on the K projection is the same for every token. RoPE turns it with the position, so of each pair of channels only the
mean over positions stays constant: nearly all of it where pairs turn slowly, which is where models have their large ones
(Jonasson 2025, arXiv:2503.01832), and nothing where they turn often.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.layers import Layer
from jfp8kv.models.rope import angles, layer_angles, rotate

EachChannel = Float[np.ndarray, "layers kv_heads head_dim"]
Number = Int[Array, ""] | int
POSITIONS = 1024  # looked at together


@dataclasses.dataclass(frozen=True)
class KeysInWeights:
    """What the weights say of keys before RoPE: their `constant` part, and how far they are from it, root mean square, if what
    comes in is as independent from channel to channel as its norm makes it alike in size."""

    constant: EachChannel
    spread: EachChannel

    @classmethod
    def of(cls, tree: Any, config: ModelConfig) -> "KeysInWeights | None":
        """None where keys have no bias, are normalized after it, or where there are shapes instead of weights."""
        layers = tree["layers"]
        bias = layers["k"].get("bias")
        if (
            bias is None
            or config.qk_norm
            or not config.pre_norm
            or isinstance(bias, jax.ShapeDtypeStruct)
        ):
            return None
        shape, norm = (config.layers, config.kv_heads, config.head_dim), layers["attention_norm"]
        offset, spread = _through(
            layers["k"]["weight"],
            norm["weight"],
            norm.get("bias"),
            plus_one=config.norm == "rms_plus_one",
        )
        constant = np.asarray(bias, np.float32) + np.asarray(offset)
        return cls(constant.reshape(shape), np.asarray(spread).reshape(shape))


@partial(jax.jit, static_argnames="plus_one")
def _through(
    weight: Float[Array, "layers out into"],
    gain: Float[Array, "layers into"],
    bias: Float[Array, "layers into"] | None,
    *,
    plus_one: bool,
) -> tuple[Float[Array, "layers out"], Float[Array, "layers out"]]:
    """Of a norm's output, of root mean square 1 before `gain` and `bias`, behind a projection: the mean and the deviation."""

    def one(args: Any) -> Any:
        weight, gain, bias = (x.astype(jnp.float32) for x in args)
        wide = weight * (gain + 1 if plus_one else gain)
        return weight @ bias, jnp.sqrt(jnp.sum(wide * wide, axis=-1))

    bias = jnp.zeros_like(gain) if bias is None else bias
    return jax.lax.map(one, (weight, gain, bias))


def turned(config: ModelConfig, mean: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What is constant of a mean that turns, over positions `0 .. tokens-1`, and how far it gets from that.

    Args:
      mean: of keys before RoPE, float32 `[layers, kv_heads, head_dim]`.

    Returns: the offset and, for each channel, the largest distance from it; both as `mean`.
    """
    if not config.ropes:
        return mean, np.zeros_like(mean)
    starts = range(0, tokens, POSITIONS)
    offset, swing = np.zeros_like(mean), np.zeros_like(mean)
    for layer in np.flatnonzero(mean.any(axis=(1, 2))).tolist():
        sums = sum(
            np.asarray(_total(config, mean, layer, start, tokens), np.float64) for start in starts
        )
        last = np.asarray(_turning(config, mean, layer, tokens - 1, tokens)[0], np.float64) * (
            len(starts) * POSITIONS - tokens
        )
        offset[layer] = (sums - last) / tokens
        swing[layer] = np.max(
            [_farthest(config, mean, layer, start, tokens, offset[layer]) for start in starts],
            axis=0,
        )
    return offset, swing


def _turning(
    config: ModelConfig, mean: EachChannel | Array, layer: Layer, start: Number, tokens: Number
) -> Float[Array, "tokens kv_heads head_dim"]:
    """The mean of one layer at `POSITIONS` positions from `start` on; those past the last of `tokens` stand at the last."""
    positions = jnp.minimum(start + jnp.arange(POSITIONS, dtype=jnp.int32), tokens - 1)
    each = layer_angles(config, angles(config, positions, jnp.asarray(tokens, jnp.int32)), layer)
    return rotate(jnp.broadcast_to(jnp.asarray(mean)[layer], (POSITIONS, *mean.shape[1:])), each)


@partial(jax.jit, static_argnums=0)
def _total(config: ModelConfig, *where: Any) -> Float[Array, "kv_heads head_dim"]:
    """The sum of `_turning`."""
    return jnp.sum(_turning(config, *where), axis=0)


@partial(jax.jit, static_argnums=0)
def _farthest(config: ModelConfig, *where_and_offset: Any) -> Float[Array, "kv_heads head_dim"]:
    """The largest distance of `_turning` from an offset."""
    *where, offset = where_and_offset
    return jnp.max(jnp.abs(_turning(config, *where) - offset), axis=0)
