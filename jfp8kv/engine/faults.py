"""What became of a step that failed, in a sentence or two for those whose requests were in it."""

import jax

from jfp8kv.cache.capacity import free_bytes
from jfp8kv.cache.config import CacheConfig
from jfp8kv.cache.pool import KVPool
from jfp8kv.core.errors import DeviceMemoryError, Jfp8kvError, StepError

LOST = "All requests were dropped, with what the cache held, and the next call is served"


def step_error(error: BaseException, *, cache_bytes: int) -> Jfp8kvError:
    """What a user is told whose request was in the step that raised `error`."""
    if isinstance(error, Jfp8kvError):
        return error
    if is_out_of_memory(error):
        return DeviceMemoryError(
            f"a step found no room on the device beside a KV cache of {cache_bytes} bytes: {first_line(error)} {LOST}; if that "
            "fails too, make an LLM with a smaller kv_cache_memory, max_num_batched_tokens or max_num_seqs."
        )
    if isinstance(error, Exception):
        return StepError(
            f"a step failed: {type(error).__name__}: {first_line(error)} {LOST}: ask again."
        )
    return StepError(f"a step was interrupted ({type(error).__name__}). {LOST}: ask again.")


def allocate_pool(kv: CacheConfig, num_pages: int) -> KVPool:
    """A pool on the device, or a `DeviceMemoryError` that says how much was asked for."""
    try:
        return jax.block_until_ready(kv.new_pool(num_pages))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"a KV cache of {num_pages * kv.page_bytes} bytes found no room on the device, where about "
            f"{free_bytes(jax.local_devices()[0])} bytes are free: {first_line(error)} Give a smaller kv_cache_memory."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory left."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """What an error says first, as a sentence: XLA's go on for pages."""
    line = next(iter(str(error).splitlines()), "").strip().rstrip(".")
    return f"{line or 'it says no more'}."
