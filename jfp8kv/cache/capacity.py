"""How many pages a byte budget buys, and what the budget is when nobody says."""

import os

import jax

from jfp8kv.core.errors import CapacityError

DEVICE_SHARE = 0.85  # of what is free on an accelerator once the weights are there
HOST_SHARE = 0.10  # of what is free in a computer's memory, which others use too


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
