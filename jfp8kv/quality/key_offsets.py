"""K offsets: the constant part of a model's keys, which need not be stored.

Softmax is invariant to a shift of all scores of a query, and `q . c` is such a shift for any `c`
that is the same for every key. So `c` can be subtracted from the keys before they are quantized,
and it need not be added back. Keys with a large constant part are common: the K biases of Qwen2 and
Qwen2.5 reach hundreds, and E4M3 then spends its three mantissa bits on the bias.

RoPE rotates the constant part by the position, and the result is not constant. So the mean is taken
of keys *before* RoPE, and `c` is the part of it that stays constant after RoPE
(models/key_bias.py). The scale must also fit positions that no prompt reached. It covers the
largest observed deviation from the *rotated* mean, plus the largest distance of the rotated mean
from `c`.

A `KeyTransform` selects which keys an observer sees: `KeysBeforeRope` for the mean, `CenteredKeys`
for the deviation from it.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfp8kv.cache.pool import KV, Layer
from jfp8kv.core.pytree import pytree
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.rope import AllAngles, layer_angles, rotate, unrotate
from jfp8kv.quality.observers import Block

ObservedBlock: TypeAlias = Callable[[Layer, KV, KV], Block]
PerChannel = Float[Array | np.ndarray, "layers kv_heads head_dim"]


@pytree
class CachedKeys:
    """The keys and values that are written to the cache."""

    def bind(self, config: ModelConfig, rotations: AllAngles | None) -> ObservedBlock:
        """Return the function from a layer, K and V to the observed block, for one chunk.

        `rotations` are the RoPE angles of the chunk.
        """
        return lambda layer, k, v: jnp.stack([k, v])


@pytree
class KeysBeforeRope:
    """Keys before RoPE, float32; values unchanged."""

    def bind(self, config: ModelConfig, rotations: AllAngles | None) -> ObservedBlock:
        """See `CachedKeys`."""

        def block(layer: Layer, k: KV, v: KV) -> Block:
            k = k.astype(jnp.float32)
            if rotations is not None:
                k = unrotate(k, layer_angles(config, rotations, layer))
            return jnp.stack([k, v.astype(jnp.float32)])

        return block


@pytree
class CenteredKeys:
    """Keys minus their mean, which RoPE rotates to each position; values unchanged."""

    mean: PerChannel

    def bind(self, config: ModelConfig, rotations: AllAngles | None) -> ObservedBlock:
        """See `CachedKeys`."""

        def block(layer: Layer, k: KV, v: KV) -> Block:
            mean = jnp.broadcast_to(jnp.asarray(self.mean)[layer], k.shape)
            if rotations is not None:
                mean = rotate(mean, layer_angles(config, rotations, layer))
            return jnp.stack([k.astype(jnp.float32) - mean, v.astype(jnp.float32)])

        return block


KeyTransform: TypeAlias = CachedKeys | KeysBeforeRope | CenteredKeys
