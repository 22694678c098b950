"""Memory budget of the KV cache: the default budget, and the number of pages that fit in it."""

import os
from typing import Any, Protocol, runtime_checkable

from jfp8kv.core.errors import CapacityError

# Share of an accelerator's free memory that is not used: for fragmentation, and for arrays that
# outlive a step, such as outputs that were not read yet.
RESERVE_SHARE = 0.05
HOST_SHARE = 0.10  # share of a host's free memory to use: other processes need memory too


@runtime_checkable
class Device(Protocol):
    """The attributes of a `jax.Device` that are used here."""

    platform: str

    def memory_stats(self) -> dict[str, Any] | None:
        """Return the statistics of the allocator: its limit, bytes in use, ...; None if unknown."""


def free_bytes(device: Device) -> int:
    """Return the bytes that can still be allocated on `device`.

    For an accelerator this follows from the allocator's limit, for a host from the free memory of
    the system.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
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


def default_bytes(device: Device, *, step_bytes: int = 0) -> int:
    """Return the default size of the KV cache in bytes.

    On an accelerator it is the free memory minus `step_bytes` and a reserve. On a host it is a
    share of the free memory, but not more than `step_bytes` leave. The size on a host is rounded
    down to a power of two: free memory varies from run to run, and each size needs a compilation.

    Args:
      device: where the cache is allocated, after the weights.
      step_bytes: the memory of the largest step, without the weights and the cache.

    Raises `CapacityError` if nothing is left.
    """
    free = free_bytes(device)
    if device.platform == "cpu":
        size = min(int(free * HOST_SHARE), free - step_bytes)
        if size > 0:
            return 1 << (size.bit_length() - 1)
    else:
        size = int(free * (1 - RESERVE_SHARE)) - step_bytes
        if size > 0:
            return size
    raise CapacityError(
        f"no memory is left for the KV cache: {free} bytes are free on the device, and the largest "
        f"step needs about {step_bytes}; give a smaller max_num_batched_tokens or max_num_seqs."
    )


def pages_for(budget: int, *, bytes_per_page: int, page_size: int, limit: int) -> int:
    """Return the number of pages in `budget` bytes, at most `limit`.

    Raises `CapacityError` if the budget is smaller than one page.
    """
    pages = min(budget // bytes_per_page, limit)
    if pages < 1:
        raise CapacityError(
            f"kv_cache_memory={budget} bytes is too small: one page of {page_size} tokens takes "
            f"{bytes_per_page} bytes, so give more."
        )
    return pages
