"""Rotary position embedding: angles, and the rotation of query and key heads (half-split layout)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import RopeConfig

Angles = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]  # cosines and sines


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position for each of the `head_dim / 2` pairs, float32, the scaling for long contexts applied.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4; "llama3" as published with Llama 3.1.
    """
    frequency = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_len * frequency / (2 * math.pi)  # over the length the model was first trained on
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / rope.factor
    return frequency.astype(np.float32)


def angles(rope: RopeConfig, head_dim: int, positions: Int[Array, " tokens"]) -> Angles:
    """Cosine and sine of every position and pair, in float32."""
    radians = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    return jnp.cos(radians), jnp.sin(radians)


def rotate(x: Float[Array, "tokens heads head_dim"], angles: Angles) -> Float[Array, "tokens heads head_dim"]:
    """Rotate pair `(i, i + head_dim / 2)` of every head by its angle; computed in float32, returned in `x.dtype`."""
    cos, sin = (a[:, None, :] for a in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
