"""Rotary position embeddings as configs describe them, in the old spelling (`rope_scaling`, `rope_theta`) and the new one
(`rope_parameters`, for the whole model or for each type of layer)."""

import math
from collections.abc import Mapping, Sequence

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import RopeConfig
from jfp8kv.models.families.fields import Fields, count, flag, mapping, number, numbers

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_OLD_NAMES = {"su": "longrope"}
_ORIGINAL = "original_max_position_embeddings"


def spelled(d: Fields) -> Fields:
    """The rope parameters of a config: `rope_scaling` (the old spelling) unless empty, else `rope_parameters`."""
    return mapping(d, "rope_scaling") or mapping(d, "rope_parameters")


def ropes(
    d: Fields, layer_types: Sequence[str], *, head_dim: int, max_len: int, theta: float = 10000.0
) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """The model's ropes and, where its layers differ, each layer's index among them.

    `theta` is the family's own where the config names none.
    """
    given = spelled(d)
    nested = {kind: given[kind] for kind in (FULL, SLIDING) if isinstance(given.get(kind), Mapping)}
    if not nested:
        given = {
            **d,
            **given,
            **({_ORIGINAL: d[_ORIGINAL]} if d.get(_ORIGINAL) else {}),
        }  # the model's own word goes first
        return (rope(given, head_dim=head_dim, max_len=max_len, theta=theta),), ()
    missing = set(layer_types) - set(nested)
    if missing:
        raise ConfigError(
            f"rope_parameters in the model's config: nothing for layers of type {missing.pop()!r}."
        )
    each = {
        kind: rope({**d, **nested[kind]}, head_dim=head_dim, max_len=max_len, theta=theta)
        for kind in nested
    }
    return distinct([each[kind] for kind in layer_types])


def distinct(
    by_layer: Sequence[RopeConfig | None],
) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """The different ropes of a model and each layer's index among them, -1 for None; () where all layers have the one."""
    found = tuple(dict.fromkeys(rope for rope in by_layer if rope is not None))
    if not found:
        return (), ()
    which = tuple(-1 if rope is None else found.index(rope) for rope in by_layer)
    return found, which if set(which) != {0} else ()


def rope(given: Fields, *, head_dim: int, max_len: int, theta: float) -> RopeConfig:
    """One rope from its parameters beside the config's own fields. Raises `ConfigError` for a type that is not supported."""
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"rope_type={kind!r}: not supported; supported are {', '.join(ROPE_KINDS)}."
        )
    share = number(given, "partial_rotary_factor", 1.0)
    if share > 1 or int(head_dim * share) % 2 or not int(head_dim * share):
        raise ConfigError(
            f"partial_rotary_factor={share}, head_dim={head_dim}: {int(head_dim * share)} features would be rotated; it must "
            "be an even number, and no more than all."
        )
    base = {"theta": number(given, "rope_theta", theta), "share": share}
    if kind == "default":
        return RopeConfig(**base)
    why = f"for rope_type {kind!r}"
    original = count(given, _ORIGINAL, max_len)
    if kind == "longrope":
        return RopeConfig(
            **base,
            kind="longrope",
            **_longrope(given, int(head_dim * share) // 2, original, max_len, why),
        )
    if kind == "yarn" and given.get("factor") is None:
        given = {**given, "factor": max_len / original}
    factor = number(given, "factor", why=why)
    if kind == "linear":
        return RopeConfig(**base, kind="linear", factor=factor)
    if kind == "dynamic":
        return RopeConfig(**base, kind="dynamic", factor=factor, original_max_len=max_len)
    if kind == "yarn":
        return RopeConfig(
            **base, kind="yarn", factor=factor, original_max_len=original, **_yarn(given, factor)
        )
    return RopeConfig(
        **base,
        kind="llama3",
        factor=factor,
        low_freq_factor=number(given, "low_freq_factor", why=why),
        high_freq_factor=number(given, "high_freq_factor", why=why),
        original_max_len=original,
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by where a config says nothing else (section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    """The same for LongRoPE (section 3)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn(given: Fields, factor: float) -> dict[str, float | bool]:
    """Bounds and magnitude: `attention_factor` if given, else a ratio of mscales or `yarn_magnitude`."""
    magnitude = given.get("attention_factor")
    if magnitude is None:
        top, bottom = given.get("mscale"), given.get("mscale_all_dim")
        both = top and bottom
        magnitude = (
            yarn_magnitude(factor, top) / yarn_magnitude(factor, bottom)
            if both
            else yarn_magnitude(factor)
        )
    else:
        magnitude = number(given, "attention_factor")
    return {
        "magnitude": float(magnitude),
        "beta_fast": number({"beta_fast": given.get("beta_fast") or 32.0}, "beta_fast"),
        "beta_slow": number({"beta_slow": given.get("beta_slow") or 1.0}, "beta_slow"),
        "truncate": flag(given, "truncate", True),
    }


def _longrope(
    given: Fields, pairs: int, original: int, max_len: int, why: str
) -> dict[str, object]:
    """Both lists of factors, and the magnitude: `attention_factor` if given, else `longrope_magnitude`."""
    factor = number(given, "factor", max_len / original)
    return {
        "factor": factor,
        "original_max_len": original,
        "magnitude": number(given, "attention_factor", longrope_magnitude(factor, original)),
        "short_factors": numbers(given, "short_factor", pairs, why),
        "long_factors": numbers(given, "long_factor", pairs, why),
    }
