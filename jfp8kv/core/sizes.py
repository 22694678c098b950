"""Sizes in bytes, as users write them."""

import math
import re

from jfp8kv.core.errors import ConfigError

_PREFIXES = "kmgt"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate(_PREFIXES, 1)}


def parse_bytes(value: object, name: str = "kv_cache_memory") -> int:
    """Return the number of bytes in `2_000_000`, "2GiB" or "512 MB".

    Raises `ConfigError`, which names the argument `name`, for any other form and for sizes below 1.
    """
    size = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", value.lower())
        if match and match[2] in _UNITS:
            size = float(match[1]) * _UNITS[match[2]]
    if isinstance(size, bool) or not isinstance(size, int | float) or not 1 <= size < math.inf:
        raise ConfigError(
            f"{name}={value!r}: must be a positive number of bytes, "
            'or a string such as "512MiB" or "2GB".'
        )
    return int(size)
