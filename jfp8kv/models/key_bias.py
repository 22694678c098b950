"""The K bias: the part of a model's keys that is the same for every token.

RoPE rotates the bias with the position, so only its mean over positions is constant. For pairs of
channels that rotate slowly the mean is nearly the whole bias, and these are the pairs in which
models have large biases (Jonasson 2025, arXiv:2503.01832). For pairs that complete many rotations
it is nearly zero.
"""

import dataclasses
from collections.abc import Mapping
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
POSITIONS_PER_CALL = 1024


@dataclasses.dataclass(frozen=True)
class KeyStats:
    """The distribution of keys before RoPE, estimated from the weights.

    Attributes:
      bias: the K bias, the same for every token.
      spread: root mean square distance of keys from the bias, assuming that the input channels of
        the projection are independent and have the size that the norm gives them.
    """

    bias: EachChannel
    spread: EachChannel

    @classmethod
    def from_weights(cls, tree: Mapping[str, Any], config: ModelConfig) -> "KeyStats | None":
        """Return the statistics of a model.

        Returns None if keys have no bias or are normalized after it is added, and if `tree` has
        shapes instead of weights.
        """
        layers = tree["layers"]
        bias = layers["k"].get("bias")
        if bias is None or isinstance(bias, jax.ShapeDtypeStruct):
            return None
        if config.qk_norm or not config.pre_norm:
            return None
        norm = layers["attention_norm"]
        from_norm, spread = _project_norm(
            layers["k"]["weight"],
            norm["weight"],
            norm.get("bias"),
            plus_one=config.norm == "rms_plus_one",
        )
        shape = (config.layers, config.kv_heads, config.head_dim)
        bias = np.asarray(bias, np.float32) + np.asarray(from_norm)
        return cls(bias.reshape(shape), np.asarray(spread).reshape(shape))


@partial(jax.jit, static_argnames="plus_one")
def _project_norm(
    weight: Float[Array, "layers out into"],
    gain: Float[Array, "layers into"],
    bias: Float[Array, "layers into"] | None,
    *,
    plus_one: bool,
) -> tuple[Float[Array, "layers out"], Float[Array, "layers out"]]:
    """Return the mean and the standard deviation of a projection of the output of a norm.

    The output of the norm is assumed to have a root mean square of 1 before `gain` and `bias`.
    """

    def one_layer(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        weight, gain, bias = (x.astype(jnp.float32) for x in args)
        scaled = weight * (gain + 1 if plus_one else gain)
        return weight @ bias, jnp.sqrt(jnp.sum(scaled * scaled, axis=-1))

    if bias is None:
        bias = jnp.zeros_like(gain)
    return jax.lax.map(one_layer, (weight, gain, bias))


def mean_rotated_bias(
    config: ModelConfig, bias: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the constant part of a K bias after RoPE, over positions `0 .. tokens - 1`.

    Args:
      config: of the model.
      bias: K bias before RoPE, float32 `[layers, kv_heads, head_dim]`.
      tokens: length of the longest sequence.

    Returns:
      The mean of the rotated bias over the positions (the K offset), and for each channel the
      largest distance of the rotated bias from it. Both have the shape of `bias`.
    """
    offset = np.zeros_like(bias)
    deviation = np.zeros_like(bias)
    if not config.ropes:
        return bias, deviation
    starts = range(0, tokens, POSITIONS_PER_CALL)
    # The last call repeats the last position this many times, which is subtracted again.
    repeats = len(starts) * POSITIONS_PER_CALL - tokens
    for layer in np.flatnonzero(bias.any(axis=(1, 2))).tolist():
        total = sum(
            np.asarray(_sum_rotated(config, bias, layer, start, tokens), np.float64)
            for start in starts
        )
        last = np.asarray(_rotated(config, bias, layer, tokens - 1, tokens)[0], np.float64)
        offset[layer] = (total - last * repeats) / tokens
        distances = [
            _max_distance(config, bias, layer, start, tokens, offset[layer]) for start in starts
        ]
        deviation[layer] = np.max(distances, axis=0)
    return offset, deviation


def _rotated(
    config: ModelConfig, bias: EachChannel | Array, layer: Layer, start: Number, tokens: Number
) -> Float[Array, "tokens kv_heads head_dim"]:
    """Return the rotated bias of one layer at `POSITIONS_PER_CALL` positions from `start` on.

    Positions from `tokens` on repeat the last one, `tokens - 1`.
    """
    positions = jnp.minimum(start + jnp.arange(POSITIONS_PER_CALL, dtype=jnp.int32), tokens - 1)
    all_angles = angles(config, positions, jnp.asarray(tokens, jnp.int32))
    shape = (POSITIONS_PER_CALL, *bias.shape[1:])
    repeated = jnp.broadcast_to(jnp.asarray(bias)[layer], shape)
    return rotate(repeated, layer_angles(config, all_angles, layer))


@partial(jax.jit, static_argnums=0)
def _sum_rotated(
    config: ModelConfig, bias: EachChannel | Array, layer: Layer, start: Number, tokens: Number
) -> Float[Array, "kv_heads head_dim"]:
    return jnp.sum(_rotated(config, bias, layer, start, tokens), axis=0)


@partial(jax.jit, static_argnums=0)
def _max_distance(
    config: ModelConfig,
    bias: EachChannel | Array,
    layer: Layer,
    start: Number,
    tokens: Number,
    offset: Float[np.ndarray | Array, "kv_heads head_dim"],
) -> Float[Array, "kv_heads head_dim"]:
    """Return the largest distance of the rotated bias from `offset`, by channel."""
    return jnp.max(jnp.abs(_rotated(config, bias, layer, start, tokens) - offset), axis=0)
