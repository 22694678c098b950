"""Rotary position embedding: angles, and the rotation of query and key heads (half-split layout).

Two kinds depend on how long the text is, not on the position alone. "longrope" divides frequencies differently once the text
has outgrown the length the model was trained on; "dynamic" stretches them further with every token. The length is `context`,
the tokens known when a request's cache was begun, or `position + 1` for tokens that came later: a rule of request and position
alone, so that chunks, batches and neighbours change nothing. A request that outgrows a longrope's short factors must begin its
cache anew (`switch_length`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import ModelConfig, RopeConfig

# Cosines and sines: of one rope, and of all of a model.
Angles = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]
AllAngles = tuple[Float[Array, "ropes tokens half"], Float[Array, "ropes tokens half"]]


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Radians per position for each rotated pair, float32; `long` picks a longrope's factors for long texts.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4; "llama3" as published with Llama 3.1; "yarn" arXiv:2309.00071,
    section 3.2; "longrope" arXiv:2402.13753. A "dynamic" rope is given as it is within its original length.
    """
    rotated = rope.rotated(head_dim)
    frequency = 1.0 / rope.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        turns = (
            rope.original_max_len * frequency / (2 * math.pi)
        )  # over the length the model was first trained on
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        frequency = _mix(frequency, rope.factor, np.clip(kept, 0.0, 1.0))
    elif rope.kind == "yarn":
        frequency = _mix(frequency, rope.factor, 1.0 - _yarn_ramp(rope, rotated))
    elif rope.kind == "longrope":
        frequency = frequency / np.asarray(rope.long_factors if long else rope.short_factors)
    return frequency.astype(np.float32)


def _mix(frequency: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Each frequency as it is to the share `kept`, divided by `factor` for the rest."""
    return kept * frequency + (1.0 - kept) * frequency / factor


def _yarn_ramp(rope: RopeConfig, rotated: int) -> np.ndarray:
    """0 for pairs that turn more than `beta_fast` times over the original length, 1 below `beta_slow`, linear between."""

    def pair_that_turns(times: float) -> float:
        return (
            rotated
            * math.log(rope.original_max_len / (times * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    return np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)


def switch_length(ropes: Sequence[RopeConfig]) -> int | None:
    """The most tokens a text may have before a longrope changes its frequencies; None when none of them does."""
    lengths = {
        rope.original_max_len
        for rope in ropes
        if rope.kind == "longrope" and rope.long_factors != rope.short_factors
    }
    return min(lengths, default=None)


def angles(
    config: ModelConfig, positions: Int[Array, " tokens"], context: Int[Array, ""]
) -> AllAngles:
    """Cosine and sine of every rope of the model, position and pair, in float32: `[ropes, tokens, half]`.

    A model with layers that rotate nothing has one entry more, the last: angles of zero, so that index -1 finds it.
    """
    length = jnp.maximum(context, positions + 1).astype(jnp.float32)[:, None]
    every = [_angles(rope, config.head_dim, positions, length) for rope in config.ropes]
    if -1 in config.layer_ropes:
        still = every[0][0].shape
        every.append((jnp.ones(still, jnp.float32), jnp.zeros(still, jnp.float32)))
    cos, sin = zip(*every, strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def layer_angles(config: ModelConfig, every: AllAngles, layer: Int[Array, ""] | int) -> Angles:
    """Those of one layer."""
    cos, sin = every
    which = config.layer_ropes
    if len(set(which)) < 2:
        index: Any = which[0] if which else 0
    else:
        index = jnp.asarray(which, jnp.int32)[layer]  # -1 is the last entry: no rotation
    return cos[index], sin[index]


def _angles(rope: RopeConfig, head_dim: int, positions: Array, length: Array) -> Angles:
    frequency: Array | np.ndarray = inverse_frequencies(rope, head_dim)[None, :]
    if rope.kind == "longrope":
        long = inverse_frequencies(rope, head_dim, long=True)[None, :]
        frequency = jnp.where(length > rope.original_max_len, long, frequency)
    elif rope.kind == "dynamic":
        rotated = rope.rotated(head_dim)
        stretch = jnp.maximum(
            rope.factor * length / rope.original_max_len - (rope.factor - 1.0), 1.0
        )
        powers = np.arange(0, rotated, 2, dtype=np.float32) / (
            rotated - 2
        )  # theta times stretch ** (rotated / (rotated - 2))
        frequency = frequency * stretch**-powers
    radians = positions.astype(jnp.float32)[:, None] * frequency
    return jnp.cos(radians) * rope.magnitude, jnp.sin(radians) * rope.magnitude


def rotate(
    x: Float[Array, "tokens heads head_dim"], angles: Angles
) -> Float[Array, "tokens heads head_dim"]:
    """Rotate pair `(i, i + half)` of every head by its angle; features past the pairs stay. Float32 inside, `x.dtype` out."""
    cos, sin = (a[:, None, :] for a in angles)
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def unrotate(
    x: Float[Array, "tokens heads head_dim"], angles: Angles
) -> Float[Array, "tokens heads head_dim"]:
    """What `rotate` made `x` of."""
    cos, sin = angles
    length = cos * cos + sin * sin  # the square of a rope's magnitude
    return rotate(x, (cos / length, -sin / length))
