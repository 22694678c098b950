"""The constant part of a model's keys, which need not be stored.

A softmax does not see what moves all scores of a query alike, and `q . c` does for any `c` that is the same for every key. So
`c` may be taken off the keys before they are quantized, and nothing need be added back. Keys with a large constant part are
common: the biases of Qwen2 and Qwen2.5 reach hundreds, and a float that spends its three bits of mantissa on them has none left
for the rest.

RoPE turns such a part with the position, and what is turned is not constant. Two things follow. The mean is taken of keys
*before* they are rotated, and `c` is what is constant of it afterwards (models/key_bias.py). And the scale must allow for
what is left at positions that no prompt reached: the largest deviation from the *turning* mean that was seen, plus the farthest
that the turning mean gets from `c`.

What is observed is a `KeyTransform` of the keys: `BeforeRope` for the mean, `AroundMean` for the deviation.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfp8kv.cache.pool import KV, Layer
from jfp8kv.core.pytree import pytree
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.rope import AllAngles, layer_angles, rotate, unrotate
from jfp8kv.quality.observers import Block

Seen = Callable[[Layer, KV, KV], Block]
EachChannel = Float[Array | np.ndarray, "layers kv_heads head_dim"]


@pytree
class AsCached:
    """Keys and values as they are written."""

    def of(self, config: ModelConfig, rotations: AllAngles | None) -> Seen:
        return lambda layer, k, v: jnp.stack([k, v])


@pytree
class BeforeRope:
    """Keys as they were before their rotation."""

    def of(self, config: ModelConfig, rotations: AllAngles | None) -> Seen:
        def seen(layer: Layer, k: KV, v: KV) -> Block:
            k, v = k.astype(jnp.float32), v.astype(jnp.float32)
            return jnp.stack(
                [k if rotations is None else unrotate(k, layer_angles(config, rotations, layer)), v]
            )

        return seen


@pytree
class AroundMean:
    """Keys less their mean, which turns as they do; values as they are."""

    mean: EachChannel

    def of(self, config: ModelConfig, rotations: AllAngles | None) -> Seen:
        def seen(layer: Layer, k: KV, v: KV) -> Block:
            mean = jnp.broadcast_to(jnp.asarray(self.mean)[layer], k.shape)
            turned = (
                mean if rotations is None else rotate(mean, layer_angles(config, rotations, layer))
            )
            return jnp.stack([k.astype(jnp.float32) - turned, v.astype(jnp.float32)])

        return seen


KeyTransform = AsCached | BeforeRope | AroundMean
