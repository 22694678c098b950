"""Rotary position embedding: angles, and the rotation of query and key heads (half-split layout).

Two kinds depend on the length of the sequence and not only on the position. "longrope" divides
frequencies by other factors once the sequence exceeds the original context length; "dynamic"
changes them with every token beyond it. The length is `context`, the number of tokens when the
cache of the request was started, or `position + 1` for later tokens. It only depends on the request
and the position, so chunking, batching and other requests do not change results (docs/notes/007). A
request that outgrows the short factors of a longrope must recompute its cache (`switch_length`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import ModelConfig, RopeConfig

# Cosines and sines: of one rope, and of all ropes of a model.
Angles = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]
AllAngles = tuple[Float[Array, "ropes tokens half"], Float[Array, "ropes tokens half"]]


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Return the radians per position of each rotated pair, float32.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4; "llama3" as published with Llama 3.1;
    "yarn" arXiv:2309.00071, section 3.2; "longrope" arXiv:2402.13753.

    Args:
      rope: for the kind "dynamic" the result holds within its original length.
      head_dim: features per head.
      long: use the factors of a longrope for long sequences.
    """
    rotated = rope.rotated(head_dim)
    frequency = 1.0 / rope.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        rotations = rope.original_max_len * frequency / (2 * math.pi)  # in the original length
        share = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        frequency = _interpolate(frequency, rope.factor, np.clip(share, 0.0, 1.0))
    elif rope.kind == "yarn":
        frequency = _interpolate(frequency, rope.factor, 1.0 - _yarn_ramp(rope, rotated))
    elif rope.kind == "longrope":
        frequency = frequency / np.asarray(rope.long_factors if long else rope.short_factors)
    return frequency.astype(np.float32)


def _interpolate(frequency: np.ndarray, factor: float, share: np.ndarray) -> np.ndarray:
    """Interpolate between each frequency (where `share` is 1) and the frequency over `factor`."""
    return share * frequency + (1.0 - share) * frequency / factor


def _yarn_ramp(rope: RopeConfig, rotated: int) -> np.ndarray:
    """Return the ramp of YaRN for each pair of channels.

    It is 0 for pairs with more than `beta_fast` rotations in the original length, 1 for pairs with
    less than `beta_slow`, and linear in between.
    """

    def pair_with_rotations(rotations: float) -> float:
        wavelengths = math.log(rope.original_max_len / (rotations * 2 * math.pi))
        return rotated * wavelengths / (2 * math.log(rope.theta))

    low = pair_with_rotations(rope.beta_fast)
    high = pair_with_rotations(rope.beta_slow)
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rotated - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    return np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)


def switch_length(ropes: Sequence[RopeConfig]) -> int | None:
    """Return the length after which a longrope changes its frequencies; None if none does."""
    lengths = {
        rope.original_max_len
        for rope in ropes
        if rope.kind == "longrope" and rope.long_factors != rope.short_factors
    }
    return min(lengths, default=None)


def angles(
    config: ModelConfig, positions: Int[Array, " tokens"], context: Int[Array, ""]
) -> AllAngles:
    """Return cosine and sine of every rope, position and pair: `[ropes, tokens, half]`, float32.

    If some layers do not rotate, there is one more entry at the end with angles of zero, at the
    index -1 that these layers have.
    """
    length = jnp.maximum(context, positions + 1).astype(jnp.float32)[:, None]
    found = [_angles(rope, config.head_dim, positions, length) for rope in config.ropes]
    if -1 in config.layer_ropes:
        shape = found[0][0].shape
        found.append((jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)))
    cos, sin = zip(*found, strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def layer_angles(config: ModelConfig, all_angles: AllAngles, layer: Int[Array, ""] | int) -> Angles:
    """Return the angles of one layer."""
    cos, sin = all_angles
    ropes = config.layer_ropes
    index: Any = ropes[0] if ropes else 0
    if len(set(ropes)) > 1:
        index = jnp.asarray(ropes, jnp.int32)[layer]  # -1 is the last entry: no rotation
    return cos[index], sin[index]


def _angles(rope: RopeConfig, head_dim: int, positions: Array, length: Array) -> Angles:
    frequency: Array | np.ndarray = inverse_frequencies(rope, head_dim)[None, :]
    if rope.kind == "longrope":
        long = inverse_frequencies(rope, head_dim, long=True)[None, :]
        frequency = jnp.where(length > rope.original_max_len, long, frequency)
    elif rope.kind == "dynamic":
        rotated = rope.rotated(head_dim)
        stretch = rope.factor * length / rope.original_max_len - (rope.factor - 1.0)
        stretch = jnp.maximum(stretch, 1.0)
        # Multiplies theta by stretch ** (rotated / (rotated - 2)).
        powers = np.arange(0, rotated, 2, dtype=np.float32) / (rotated - 2)
        frequency = frequency * stretch**-powers
    radians = positions.astype(jnp.float32)[:, None] * frequency
    return jnp.cos(radians) * rope.magnitude, jnp.sin(radians) * rope.magnitude


def rotate(
    x: Float[Array, "tokens heads head_dim"], angles: Angles
) -> Float[Array, "tokens heads head_dim"]:
    """Rotate pair `(i, i + half)` of every head by its angle, in float32; returns `x.dtype`.

    Features past the pairs are not rotated.
    """
    cos, sin = (a[:, None, :] for a in angles)
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def unrotate(
    x: Float[Array, "tokens heads head_dim"], angles: Angles
) -> Float[Array, "tokens heads head_dim"]:
    """Return the input of `rotate` from its output."""
    cos, sin = angles
    length = cos * cos + sin * sin  # the square of the magnitude of a rope
    return rotate(x, (cos / length, -sin / length))
