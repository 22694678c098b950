"""Read single fields of a `config.json`. A `ConfigError` names the field and what it allows."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

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
CONFIG_FILE = "config.json"
_IN_CONFIG = "in the model's config"


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def count(d: Fields, key: str, default: int | None = None, minimum: int = 1) -> int:
    """Return an integer of at least `minimum`; `default` if the field is missing or null."""
    value = d.get(key)
    value = default if value is None else value
    allowed = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
    if value is None:
        raise ConfigError(f"the model's config has no {key}: it must be {allowed}.")
    if not is_integer(value) or value < minimum:
        raise ConfigError(f"{key}={value!r} {_IN_CONFIG}: must be {allowed}.")
    return value


def number(d: Fields, key: str, default: float | None = None, where: str = _IN_CONFIG) -> float:
    """Return a positive finite number; `default` if the field is missing or null."""
    value = d.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r} {where}: must be a positive number.")
    return float(value)


def optional_number(d: Fields, key: str, default: float | None = None) -> float | None:
    """Return a positive finite number, or None for null; `default` if the field is missing."""
    return None if d.get(key, default) is None else number(d, key, default)


def numbers(d: Fields, key: str, length: int, where: str) -> tuple[float, ...]:
    """Return a list of `length` positive numbers."""
    value = d.get(key)
    if not isinstance(value, list | tuple) or len(value) != length:
        given = f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)
        raise ConfigError(
            f"{key} {where}: must be a list of {length} positive numbers, not {given}."
        )
    return tuple(number({key: entry}, key, where=where) for entry in value)


def flag(d: Fields, key: str, default: bool = False) -> bool:
    """Return true or false; `default` if the field is missing or null."""
    value = d.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} {_IN_CONFIG}: must be true or false.")
    return value


def mapping(d: Fields, key: str) -> Fields:
    """Return a mapping; an empty one if the field is missing or null."""
    value = d.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} {_IN_CONFIG}: must be a mapping, or null.")
    return value


def by_layer(d: Fields, key: str, layers: int) -> list[Any] | None:
    """Return the first `layers` entries of a list, or None if the field is missing or null."""
    value = d.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) < layers:
        raise ConfigError(
            f"{key}={value!r} {_IN_CONFIG}: must be a list with an entry for each of "
            f"{layers} layers."
        )
    return list(value[:layers])


def activation(name: object, key: str = "hidden_act") -> Activation:
    """Return an activation by Hugging Face's name for it."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"{key}={name!r}: not supported; supported are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def dtype(d: Fields) -> str:
    """Return the declared dtype of the weights, in the old or new spelling; else "float32"."""
    name = str(d.get("dtype") or d.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"dtype={name!r} {_IN_CONFIG}: not supported; supported are {', '.join(DTYPES)}."
        )
    return name


def ids(value: object) -> tuple[int, ...]:
    """Return the token ids of an `eos_token_id` (one id, a list or None) without repeats."""
    if value is None:
        return ()
    listed = value if isinstance(value, list | tuple) else [value]
    if not all(is_integer(token) for token in listed):
        raise ConfigError(
            f"eos_token_id={value!r} {_IN_CONFIG}: must be a token id, or a list of them."
        )
    return tuple(dict.fromkeys(listed))


def ids_in_vocab(
    tokens: Iterable[int], vocab: int, *, key: str, where: str = CONFIG_FILE
) -> tuple[int, ...]:
    """Return the ids that a vocabulary has. A negative id means none.

    Warns about an id past the end, naming the key and the file: `where`.
    """
    known = []
    for token in tokens:
        if token >= vocab:
            warnings.warn(
                f"{where}: {key}={token} is outside the vocabulary of {vocab} tokens, and is "
                "ignored.",
                stacklevel=2,
            )
        elif token >= 0:
            known.append(token)
    return tuple(dict.fromkeys(known))


def eos_ids(d: Fields, vocab: int, default: int | None = None) -> tuple[int, ...]:
    """Return the ids of `eos_token_id` that the vocabulary has; `default` if it is missing."""
    if "eos_token_id" not in d:
        return () if default is None or default >= vocab else (default,)
    return ids_in_vocab(ids(d["eos_token_id"]), vocab, key="eos_token_id")


def token_id(d: Fields, key: str, vocab: int, default: int | None = None) -> int | None:
    """Return a token id that the vocabulary has; None for null; `default` if it is missing."""
    if key not in d:
        return None if default is None or default >= vocab else default
    value = d[key]
    if value is None:
        return None
    if not is_integer(value):
        raise ConfigError(f"{key}={value!r} {_IN_CONFIG}: must be a token id.")
    return next(iter(ids_in_vocab([value], vocab, key=key)), None)


def refuse(d: Fields, key: str, *allowed: object, reason: str) -> None:
    """Raise a `ConfigError` unless the field is missing, null or one of `allowed`."""
    value = d.get(key)
    if value is not None and value not in allowed:
        raise ConfigError(f"{key}={value!r} {_IN_CONFIG}: {reason}.")
