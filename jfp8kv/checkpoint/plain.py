"""A `ModelConfig` as JSON values and back, whatever fields it has: dataclasses become tagged objects, tuples lists.

Frozen configs hold no lists, so every list that is read is a tuple. A field that the file lacks takes its default, which
is what lets an older file be read; one that the class lacks is an error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jfp8kv.models import config as configs

_TAG = "type"


def to_plain(value: Any) -> Any:
    """The same in dicts, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        assert _TAG not in fields, f"{_TAG!r} tells dataclasses apart and cannot name a field"
        return {_TAG: type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    assert value is None or isinstance(value, str | bool | int | float), (
        f"{value!r} has no written form"
    )
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` was given. Raises TypeError or ValueError for anything it did not write."""
    if isinstance(value, list):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    cls = getattr(configs, str(value.get(_TAG)), None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{_TAG}={value.get(_TAG)!r}: no such kind of config")
    return cls(**{name: from_plain(item) for name, item in value.items() if name != _TAG})
