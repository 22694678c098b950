"""Read the rotary position embeddings (RoPE) of a config.

The old spelling is `rope_scaling` with `rope_theta`. The new one is `rope_parameters`, for the
whole model or for each type of layer.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import RopeConfig, RopeKind
from jfp8kv.models.families.fields import Fields, count, flag, mapping, number, numbers

FULL = "full_attention"
SLIDING = "sliding_attention"
ROPE_KINDS: tuple[str, ...] = typing.get_args(RopeKind)
ORIGINAL = "original_max_position_embeddings"
_OLD_NAMES = {"su": "longrope"}

Ropes = tuple[RopeConfig, ...]
LayerRopes = tuple[int, ...]  # by layer: an index into the ropes, -1 for none


def rope_entries(d: Fields) -> Fields:
    """Return `rope_scaling` (the old spelling) unless it is empty, else `rope_parameters`."""
    return mapping(d, "rope_scaling") or mapping(d, "rope_parameters")


def read_ropes(
    d: Fields, layer_types: Sequence[str], *, head_dim: int, max_len: int, theta: float = 10000.0
) -> tuple[Ropes, LayerRopes]:
    """Return the ropes of a model, and each layer's index if layers differ.

    Args:
      theta: the family's default.
    """
    entries = rope_entries(d)
    by_type = {
        kind: entries[kind] for kind in (FULL, SLIDING) if isinstance(entries.get(kind), Mapping)
    }
    if not by_type:
        merged = {**d, **entries}
        if d.get(ORIGINAL):
            merged[ORIGINAL] = d[ORIGINAL]  # the field of the model overrides the one of the rope
        return (read_rope(merged, head_dim=head_dim, max_len=max_len, theta=theta),), ()
    missing = set(layer_types) - set(by_type)
    if missing:
        raise ConfigError(
            f"rope_parameters in the model's config: no entry for layers of type {missing.pop()!r}."
        )
    ropes = {
        kind: read_rope({**d, **own}, head_dim=head_dim, max_len=max_len, theta=theta)
        for kind, own in by_type.items()
    }
    return unique_ropes([ropes[kind] for kind in layer_types])


def unique_ropes(by_layer: Sequence[RopeConfig | None]) -> tuple[Ropes, LayerRopes]:
    """Return the distinct ropes and each layer's index, -1 for None.

    The indices are () if all layers have the same rope.
    """
    ropes = tuple(dict.fromkeys(rope for rope in by_layer if rope is not None))
    if not ropes:
        return (), ()
    indices = tuple(-1 if rope is None else ropes.index(rope) for rope in by_layer)
    return ropes, indices if set(indices) != {0} else ()


def read_rope(d: Fields, *, head_dim: int, max_len: int, theta: float) -> RopeConfig:
    """Return one rope from a mapping of its entries and the fields of the config.

    Raises:
      ConfigError: an unsupported type, or an invalid value.
    """
    kind = d.get("rope_type") or d.get("type") or "default"
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"rope_type={kind!r}: not supported; supported are {', '.join(ROPE_KINDS)}."
        )
    base = RopeConfig(theta=number(d, "rope_theta", theta), share=_rotated_share(d, head_dim))
    if kind == "default":
        return base
    where = f"for rope_type {kind!r}"
    original = count(d, ORIGINAL, max_len)
    if kind == "longrope":
        return _longrope(d, base, base.rotated(head_dim) // 2, original, max_len, where)
    if kind == "yarn" and d.get("factor") is None:
        d = {**d, "factor": max_len / original}
    factor = number(d, "factor", where=where)
    if kind == "linear":
        return dataclasses.replace(base, kind="linear", factor=factor)
    if kind == "dynamic":
        return dataclasses.replace(base, kind="dynamic", factor=factor, original_max_len=max_len)
    if kind == "yarn":
        return _yarn(d, base, factor, original)
    return dataclasses.replace(
        base,
        kind="llama3",
        factor=factor,
        low_freq_factor=number(d, "low_freq_factor", where=where),
        high_freq_factor=number(d, "high_freq_factor", where=where),
        original_max_len=original,
    )


def _rotated_share(d: Fields, head_dim: int) -> float:
    share = number(d, "partial_rotary_factor", 1.0)
    features = int(head_dim * share)
    if share > 1 or features % 2 or not features:
        raise ConfigError(
            f"partial_rotary_factor={share}, head_dim={head_dim}: {features} features would be "
            "rotated; it must be a positive even number of at most head_dim."
        )
    return share


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's default factor on cosines and sines (section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    """Return LongRoPE's default factor on cosines and sines (section 3)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn(d: Fields, base: RopeConfig, factor: float, original: int) -> RopeConfig:
    """Return a YaRN rope.

    Its magnitude is `attention_factor` if given, else a ratio of mscales or `yarn_magnitude`.
    """
    if d.get("attention_factor") is not None:
        magnitude = number(d, "attention_factor")
    elif d.get("mscale") and d.get("mscale_all_dim"):
        magnitude = yarn_magnitude(factor, number(d, "mscale"))
        magnitude /= yarn_magnitude(factor, number(d, "mscale_all_dim"))
    else:
        magnitude = yarn_magnitude(factor)
    return dataclasses.replace(
        base,
        kind="yarn",
        factor=factor,
        original_max_len=original,
        magnitude=magnitude,
        beta_fast=number({"beta_fast": d.get("beta_fast") or 32.0}, "beta_fast"),
        beta_slow=number({"beta_slow": d.get("beta_slow") or 1.0}, "beta_slow"),
        truncate=flag(d, "truncate", True),
    )


def _longrope(
    d: Fields, base: RopeConfig, pairs: int, original: int, max_len: int, where: str
) -> RopeConfig:
    """Return a LongRoPE rope.

    Its magnitude is `attention_factor` if given, else `longrope_magnitude`.
    """
    factor = number(d, "factor", max_len / original)
    return dataclasses.replace(
        base,
        kind="longrope",
        factor=factor,
        original_max_len=original,
        magnitude=number(d, "attention_factor", longrope_magnitude(factor, original)),
        short_factors=numbers(d, "short_factor", pairs, where),
        long_factors=numbers(d, "long_factor", pairs, where),
    )
