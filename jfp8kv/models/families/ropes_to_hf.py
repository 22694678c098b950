"""Write the rotary position embeddings of a config, in both spellings: the inverse of `ropes.py`.

Older readers know `rope_theta` with `rope_scaling`, newer ones `rope_parameters`. For a model with
one rope, both are written. A rope per type of layer only exists in the new spelling, except in
Gemma 3.
"""

import math
from typing import Any

from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.models.families.common import extended_max_len
from jfp8kv.models.families.ropes import (
    FULL,
    ORIGINAL,
    SLIDING,
    longrope_magnitude,
    yarn_magnitude,
)


def layer_types_of(config: ModelConfig) -> list[str]:
    """Return the attention type of every layer.

    Without windows, layers with the first of two ropes count as sliding.
    """
    layers = range(config.layers)
    if config.windows or len(config.ropes) < 2:
        return [SLIDING if config.window(layer) else FULL for layer in layers]
    return [SLIDING if config.rope(layer) == config.ropes[0] else FULL for layer in layers]


def max_positions(config: ModelConfig) -> int:
    """Return the `max_position_embeddings` that `extended_max_len` extends to `config.max_len`."""
    for rope in config.ropes:
        if rope.kind == "dynamic":
            return rope.original_max_len
    factor = max((rope.factor for rope in config.ropes if rope.kind == "linear"), default=1.0)
    base = config.max_len / factor
    for length in (config.max_len, math.floor(base), math.ceil(base)):
        if extended_max_len(config.ropes, length) == config.max_len:
            return length
    return config.max_len


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a model with one rope, or with one per type of layer."""
    if len(config.ropes) > 1:
        positions = max_positions(config)
        by_type = _rope_by_type(config).items()
        return {"rope_parameters": {kind: _parameters(rope, positions) for kind, rope in by_type}}
    if not config.ropes:
        return {}
    (rope,) = config.ropes
    scaling = _scaling(rope, max_positions(config))
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": rope.kind} | scaling if scaling else None,
        "rope_parameters": _parameters(rope, max_positions(config)),
    } | _share(rope)


def phi3_rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a Phi-3, which has the original length outside of `rope_scaling`.

    Older readers only accept a `rope_scaling` with exactly three entries.
    """
    fields = rope_fields(config)
    scaling = fields["rope_scaling"]
    if not scaling:
        return fields | {ORIGINAL: config.max_len}
    original = scaling.pop(ORIGINAL)
    kind = scaling.pop("rope_type")
    return fields | {"rope_scaling": {"type": kind} | scaling, ORIGINAL: original}


def gemma3_rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a Gemma 3, which always has a rope for both types of layer."""
    ropes = dict.fromkeys((FULL, SLIDING), config.ropes[0]) | _rope_by_type(config)
    full = ropes[FULL]
    scaling = _scaling(full, config.max_len)
    parameters = {kind: _parameters(rope, config.max_len) for kind, rope in ropes.items()}
    return {
        "rope_theta": full.theta,
        "rope_local_base_freq": ropes[SLIDING].theta,
        "rope_scaling": {"rope_type": full.kind} | scaling if scaling else None,
        "rope_parameters": parameters,
    }


def _rope_by_type(config: ModelConfig) -> dict[str, RopeConfig]:
    """Return the rope of each type of layer.

    A config with several ropes for one type cannot be expressed; `config_to_hf` detects it.
    """
    by_layer = ((kind, config.rope(layer)) for layer, kind in enumerate(layer_types_of(config)))
    return {kind: rope for kind, rope in by_layer if rope is not None}


def _parameters(rope: RopeConfig, max_len: int) -> dict[str, Any]:
    base = {"rope_type": rope.kind, "rope_theta": rope.theta}
    return base | _scaling(rope, max_len) | _share(rope)


def _share(rope: RopeConfig) -> dict[str, float]:
    return {} if rope.share == 1 else {"partial_rotary_factor": rope.share}


def _scaling(rope: RopeConfig, max_len: int) -> dict[str, Any]:
    """Return the entries of a rope without theta, its share, and values that readers infer."""
    match rope.kind:
        case "default":
            return {}
        case "linear" | "dynamic":
            return {"factor": rope.factor}
        case "llama3":
            return {
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                ORIGINAL: rope.original_max_len,
            }
        case "yarn":
            return {
                "factor": rope.factor,
                ORIGINAL: rope.original_max_len,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
            } | _magnitude(rope, yarn_magnitude(rope.factor))
        case "longrope":
            default = longrope_magnitude(rope.factor, rope.original_max_len)
            is_inferred = rope.factor == max_len / rope.original_max_len
            factor = {} if is_inferred else {"factor": rope.factor}
            return (
                {
                    ORIGINAL: rope.original_max_len,
                    "short_factor": list(rope.short_factors),
                    "long_factor": list(rope.long_factors),
                }
                | factor
                | _magnitude(rope, default)
            )


def _magnitude(rope: RopeConfig, default: float) -> dict[str, float]:
    return {} if rope.magnitude == default else {"attention_factor": rope.magnitude}
