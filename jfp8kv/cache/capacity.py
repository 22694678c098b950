"""Memory budget of the KV cache: its default, and the pages it pays for."""

import os

import jax

from jfp8kv.core.errors import CapacityError

DEVICE_SHARE = 0.85  # of the free memory of an accelerator, after the weights are loaded
HOST_SHARE = 0.10  # of the free memory of a host, which other processes use too


def free_bytes(device: jax.Device) -> int:
    """Return the bytes that can still be allocated on `device`.

    On an accelerator the allocator's limit counts, on a host the free memory of the system.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _host_free_bytes()


def _host_free_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: count all memory as free
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_bytes(device: jax.Device) -> int:
    """Return the size of the cache if none is given: a share of the free memory of `device`.

    On a host it is rounded down to a power of two: free memory varies from run to run, and a
    compiled program fits one size.
    """
    if device.platform != "cpu":
        return int(free_bytes(device) * DEVICE_SHARE)
    return 1 << (int(free_bytes(device) * HOST_SHARE).bit_length() - 1)


def pages_for(budget: int, *, bytes_per_page: int, page_size: int, limit: int) -> int:
    """Return the number of pages in `budget` bytes, at most `limit`.

    Raises `CapacityError` if the budget is smaller than one page.
    """
    pages = min(budget // bytes_per_page, limit)
    if pages < 1:
        raise CapacityError(
            f"kv_cache_memory={budget} bytes is too small: one page of {page_size} tokens takes "
            f"{bytes_per_page} bytes."
        )
    return pages
