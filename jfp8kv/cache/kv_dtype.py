"""From what a user says of `kv_dtype` to the format of each layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from jfp8kv.cache.plan import KVPlan
from jfp8kv.core.errors import ConfigError, did_you_mean, invalid_choice
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.types import KV_DTYPES
from jfp8kv.models.config import ModelConfig

KINDS_OF_LAYER = ("sliding_window", "full_attention")
_KEYS = ("default", "skip", "skip_dtype")
_FORMS = (
    "a name for all layers, {'default': name, 'skip': [0, 'sliding_window']}, a list of one name per layer, a KVPlan or a path "
    "to one"
)


def is_name(kv_dtype: Any) -> bool:
    """Whether this can only be one format's name, known or not."""
    return isinstance(kv_dtype, str) and not looks_like_path(kv_dtype)


def plan_of(kv_dtype: Any) -> KVPlan | None:
    """The plan that was given, or is in the file that was; None where neither was."""
    if looks_like_path(kv_dtype):
        return KVPlan.load(kv_dtype)
    return kv_dtype if isinstance(kv_dtype, KVPlan) else None


def layer_formats(kv_dtype: Any, config: ModelConfig, weights_dtype: str) -> tuple[KVFormat, ...]:
    """The format of every layer.

    Args:
      kv_dtype: a name for all; a mapping of "default" (a name, "auto" if left out), "skip" (layer numbers, from the end if
        negative, "sliding_window" or "full_attention") and "skip_dtype" (what skipped layers keep, "bfloat16" if left out);
        or a list of one name per layer.
      config: the model's.
      weights_dtype: what "auto" is where the checkpoint declares nothing.

    Raises `ConfigError` for anything else.
    """

    def named(name: Any) -> KVFormat:
        return kv_format(
            (config.kv_cache_dtype or weights_dtype)
            if isinstance(name, str) and name == "auto"
            else name
        )

    if isinstance(kv_dtype, str):
        return (named(kv_dtype),) * config.layers
    if isinstance(kv_dtype, Mapping):
        return _with_skipped(kv_dtype, config, named)
    if isinstance(kv_dtype, Sequence):
        if len(kv_dtype) != config.layers:
            raise ConfigError(
                f"kv_dtype lists {len(kv_dtype)} layers, and this model has {config.layers}: give one name for each."
            )
        return tuple(named(name) for name in kv_dtype)
    raise ConfigError(
        f"kv_dtype={kv_dtype!r}: must be {_FORMS}. Names are {', '.join(map(repr, KV_DTYPES))}."
    )


def _with_skipped(
    given: Mapping[str, Any], config: ModelConfig, named: Any
) -> tuple[KVFormat, ...]:
    for key in given:
        if key not in _KEYS:
            raise ConfigError(
                f"kv_dtype has the key {key!r}: must be of {', '.join(map(repr, _KEYS))}.{did_you_mean(key, _KEYS)}"
            )
    skip = given.get("skip", ())
    if isinstance(skip, str | int) or not isinstance(skip, Sequence):
        raise ConfigError(
            f"kv_dtype skips {skip!r}: must be a list of layers, such as [0, 'sliding_window']."
        )
    skipped = {layer for entry in skip for layer in _layers(entry, config)}
    usual, other = named(given.get("default", "auto")), named(given.get("skip_dtype", "bfloat16"))
    return tuple(other if layer in skipped else usual for layer in range(config.layers))


def _layers(entry: Any, config: ModelConfig) -> Sequence[int]:
    """The layers that an entry of "skip" means."""
    count = config.layers
    if isinstance(entry, str):
        if entry not in KINDS_OF_LAYER:
            raise invalid_choice("kv_dtype's skip", entry, (*KINDS_OF_LAYER, "a layer's number"))
        return [
            layer
            for layer in range(count)
            if bool(config.window(layer)) == (entry == "sliding_window")
        ]
    if isinstance(entry, bool) or not isinstance(entry, int) or not -count <= entry < count:
        raise ConfigError(
            f"kv_dtype skips layer {entry!r}: this model's layers are 0 to {count - 1}, or -1 to -{count} from the end; "
            f"{' and '.join(map(repr, KINDS_OF_LAYER))} name all layers of a kind."
        )
    return [entry % count]
