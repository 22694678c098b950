"""Rotary position embeddings back as a `config.json` has them: what `ropes.py` reads, in both spellings at once.

Readers of different ages know `rope_theta` with `rope_scaling`, or `rope_parameters`. Where a model has one rope both are
written and say the same. A rope for each type of layer exists in the new spelling alone, except in Gemma 3.
"""

import math
from typing import Any

from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.models.families.common import reach
from jfp8kv.models.families.ropes import FULL, SLIDING, longrope_magnitude, yarn_magnitude

_ORIGINAL = "original_max_position_embeddings"


def kinds_of_layers(c: ModelConfig) -> list[str]:
    """The type of attention of every layer. Without windows, the layers of the first of two ropes are taken to slide."""
    if c.windows or len(c.ropes) < 2:
        return [SLIDING if c.window(layer) else FULL for layer in range(c.layers)]
    return [SLIDING if c.rope(layer) == c.ropes[0] else FULL for layer in range(c.layers)]


def positions(c: ModelConfig) -> int:
    """`max_position_embeddings`: what `reach` makes `max_len` of, since a rope that is stretched reaches beyond it."""
    for rope in c.ropes:
        if rope.kind == "dynamic":
            return rope.original_max_len
    stretch = max((rope.factor for rope in c.ropes if rope.kind == "linear"), default=1.0)
    tried = (c.max_len, math.floor(c.max_len / stretch), math.ceil(c.max_len / stretch))
    return next((length for length in tried if reach(c.ropes, length) == c.max_len), c.max_len)


def one_rope(c: ModelConfig) -> dict[str, Any]:
    """The fields of a model with one rope, or with one for each type of layer."""
    if len(c.ropes) > 1:
        return {"rope_parameters": _by_kind(c)}
    if not c.ropes:
        return {}
    (rope,) = c.ropes
    scaling = _scaling(rope, positions(c))
    old = {"rope_type": rope.kind} | scaling if scaling else None
    share = {} if rope.share == 1 else {"partial_rotary_factor": rope.share}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": old,
        "rope_parameters": _parameters(rope, positions(c)),
    } | share


def phi3_rope(c: ModelConfig) -> dict[str, Any]:
    """Phi-3 keeps the original length beside its rope, and its first readers take `rope_scaling` with three entries alone."""
    written = one_rope(c)
    if old := written["rope_scaling"]:
        original, kind = old.pop(_ORIGINAL), old.pop("rope_type")
        return written | {"rope_scaling": {"type": kind} | old, _ORIGINAL: original}
    return written | {_ORIGINAL: c.max_len}


def gemma3_ropes(c: ModelConfig) -> dict[str, Any]:
    """Gemma 3 has a rope for each type of layer, whether it has both types or not."""
    each = dict.fromkeys((FULL, SLIDING), c.ropes[0]) | _rope_of_kind(c)
    scaling = _scaling(each[FULL], c.max_len)
    return {
        "rope_theta": each[FULL].theta,
        "rope_local_base_freq": each[SLIDING].theta,
        "rope_scaling": {"rope_type": each[FULL].kind} | scaling if scaling else None,
        "rope_parameters": {kind: _parameters(rope, c.max_len) for kind, rope in each.items()},
    }


def _by_kind(c: ModelConfig) -> dict[str, Any]:
    return {kind: _parameters(rope, positions(c)) for kind, rope in _rope_of_kind(c).items()}


def _rope_of_kind(c: ModelConfig) -> dict[str, RopeConfig]:
    """The rope of each type of layer that has one. What else there is cannot be said, and is found missing when read back."""
    each = ((kind, c.rope(layer)) for layer, kind in enumerate(kinds_of_layers(c)))
    return {kind: rope for kind, rope in each if rope is not None}


def _parameters(rope: RopeConfig, max_len: int) -> dict[str, Any]:
    share = {} if rope.share == 1 else {"partial_rotary_factor": rope.share}
    return {"rope_type": rope.kind, "rope_theta": rope.theta} | _scaling(rope, max_len) | share


def _scaling(rope: RopeConfig, max_len: int) -> dict[str, Any]:
    """What a kind of rope has beside its theta. What readers find by themselves is left out."""
    match rope.kind:
        case "default":
            return {}
        case "linear" | "dynamic":
            return {"factor": rope.factor}
        case "llama3":
            bounds = {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
            }
            return {"factor": rope.factor, **bounds, _ORIGINAL: rope.original_max_len}
        case "yarn":
            bounds = {
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
            }
            return {"factor": rope.factor, _ORIGINAL: rope.original_max_len, **bounds} | _magnitude(
                rope, yarn_magnitude(rope.factor)
            )
        case "longrope":
            usual = longrope_magnitude(rope.factor, rope.original_max_len)
            factors = {
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
            }
            stretch = (
                {} if rope.factor == max_len / rope.original_max_len else {"factor": rope.factor}
            )
            return {_ORIGINAL: rope.original_max_len, **factors} | stretch | _magnitude(rope, usual)


def _magnitude(rope: RopeConfig, usual: float) -> dict[str, float]:
    return {} if rope.magnitude == usual else {"attention_factor": rope.magnitude}
