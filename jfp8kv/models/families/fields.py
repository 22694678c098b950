"""Reading single fields of a `config.json`: the value, or a `ConfigError` that names the field and what it may be."""

import math
from collections.abc import Mapping
from typing import Any

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import Activation

Fields = Mapping[str, Any]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES = ("float32", "bfloat16", "float16")
_HERE = "in the model's config"


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count(d: Fields, key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number of at least `least`; `default` where the field is missing or null."""
    value = d.get(key)
    value = default if value is None else value
    what = "a positive integer" if least == 1 else f"an integer, {least} or more"
    if value is None:
        raise ConfigError(f"the model's config has no {key}: it must be {what}.")
    if not is_whole(value) or value < least:
        raise ConfigError(f"{key}={value!r} {_HERE}: must be {what}.")
    return value


def number(d: Fields, key: str, default: float | None = None, why: str = _HERE) -> float:
    """A positive finite number; `default` where the field is missing or null."""
    value = d.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r} {why}: must be a positive number.")
    return float(value)


def optional_number(d: Fields, key: str, default: float | None = None) -> float | None:
    """A positive finite number or None; `default` only where the field is missing: null means none."""
    return None if d.get(key, default) is None else number(d, key, default)


def numbers(d: Fields, key: str, length: int, why: str) -> tuple[float, ...]:
    """A list of `length` positive numbers."""
    value = d.get(key)
    if not isinstance(value, list | tuple) or len(value) != length:
        given = f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)
        raise ConfigError(f"{key} {why}: must be a list of {length} positive numbers, not {given}.")
    return tuple(number({key: entry}, key, why=why) for entry in value)


def flag(d: Fields, key: str, default: bool = False) -> bool:
    """true or false; `default` where the field is missing or null."""
    value = d.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} {_HERE}: must be true or false.")
    return value


def mapping(d: Fields, key: str) -> Fields:
    """A mapping; an empty one where the field is missing or null."""
    value = d.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} {_HERE}: must be a mapping, or null.")
    return value


def by_layer(d: Fields, key: str, layers: int) -> list[Any] | None:
    """A list with an entry for each layer (more are left over), or None where the field is missing or null."""
    value = d.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) < layers:
        raise ConfigError(
            f"{key}={value!r} {_HERE}: must be a list with an entry for each of {layers} layers."
        )
    return list(value[:layers])


def activation(name: Any, key: str = "hidden_act") -> Activation:
    """An activation by Hugging Face's name for it."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"{key}={name!r}: not supported; supported are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def dtype(d: Fields) -> str:
    """The type the checkpoint says its weights are, old or new spelling; float32 where it says nothing."""
    name = str(d.get("dtype") or d.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"dtype={name!r} {_HERE}: not supported; supported are {', '.join(DTYPES)}."
        )
    return name


def ids(value: Any) -> tuple[int, ...]:
    """An `eos_token_id`, which is one token id, several or none, as a tuple without repeats; `ConfigError` otherwise."""
    if value is None:
        return ()
    listed = value if isinstance(value, list | tuple) else [value]
    if not all(is_whole(token) for token in listed):
        raise ConfigError(f"eos_token_id={value!r} {_HERE}: must be a token id, or a list of them.")
    return tuple(dict.fromkeys(listed))


def one_id(d: Fields, key: str, default: int | None = None) -> int | None:
    """A token id or None."""
    value = d.get(key, default)
    if value is not None and not is_whole(value):
        raise ConfigError(f"{key}={value!r} {_HERE}: must be a token id.")
    return value


def refuse(d: Fields, key: str, *allowed: Any, why: str) -> None:
    """Raise a `ConfigError` unless the field is missing, null or one of `allowed`."""
    value = d.get(key)
    if value is not None and value not in allowed:
        raise ConfigError(f"{key}={value!r} {_HERE}: {why}.")
