"""How many pages a byte budget buys, and what the budget is when nobody says."""

import os
import re
from typing import Any

import jax

from jfp8kv.core.errors import CapacityError, ConfigError

DEVICE_SHARE = 0.85  # of what is free on an accelerator once the weights are there
HOST_SHARE = 0.10  # of what is free in a computer's memory, which others use too

_UNITS = {"": 1, "b": 1} | {
    f"{p}{b}": base**i for b, base in (("b", 1000), ("ib", 1024)) for i, p in enumerate("kmgt", 1)
}


def parse_bytes(value: Any) -> int:
    """Bytes of `2_000_000`, "2GiB", "512 MB". Raises `ConfigError` for anything else, zero and negatives included."""
    match = (
        re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", value.lower())
        if isinstance(value, str)
        else None
    )
    if match and match[2] in _UNITS:
        value = float(match[1]) * _UNITS[match[2]]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not value >= 1
        or value == float("inf")
    ):
        raise ConfigError(
            f'kv_cache_memory={value!r}: must be a positive number of bytes, or text such as "512MiB" or "2GB".'
        )
    return int(value)


def free_bytes(device: jax.Device) -> int:
    """Bytes an allocation on `device` may still take: the allocator's own limit on an accelerator, the system's on a host."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _host_free_bytes()


def _host_free_bytes() -> int:
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        with open("/proc/meminfo") as lines:
            free = [
                int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
            ] or free
    except OSError:
        pass  # not Linux: all of the memory stands in for what is free of it
    return free[0]


def default_bytes(device: jax.Device) -> int:
    """The share of what is free on `device` that the cache takes when no size is given.

    On a host it is rounded down to a power of two: what is free varies from run to run, and a compiled program fits one size.
    """
    if device.platform != "cpu":
        return int(free_bytes(device) * DEVICE_SHARE)
    return 1 << (int(free_bytes(device) * HOST_SHARE).bit_length() - 1)


def pages_for(budget: int, *, bytes_per_page: int, page_size: int, most: int) -> int:
    """Pages that `budget` bytes buy, at most `most`. Raises `CapacityError` when it does not buy one."""
    pages = min(budget // bytes_per_page, most)
    if pages < 1:
        raise CapacityError(
            f"kv_cache_memory={budget} bytes holds no page: one page of {page_size} tokens takes {bytes_per_page} bytes."
        )
    return pages
