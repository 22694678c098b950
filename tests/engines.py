"""Helpers for tests of LLMs with tiny models."""

import contextlib
from collections.abc import Iterator

import jfp8kv
from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.pool import poison
from tests.models.test_decoder import REFERENCES


def tiny_llm(family: str = "llama_gqa", **options) -> jfp8kv.LLM:
    """Return a poisoned LLM of a reference model in float32, with an E4M3 cache by default."""
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    return poisoned(jfp8kv.LLM(params, **{"kv_dtype": "fp8_e4m3"} | options))


def poisoned(llm: jfp8kv.LLM) -> jfp8kv.LLM:
    """Fill the pool with NaN codes, so that a read of an unwritten slot shows."""
    formats = {spec.fmt for spec in llm.engine.cache_config.specs}
    code = 0xFF if len(formats) > 1 else formats.pop().nan_code
    llm.engine.pages = poison(llm.engine.pages, code)
    return llm


def used_pages(llm: jfp8kv.LLM) -> int:
    """Return the number of allocated pages, once cancellations have taken effect."""
    llm._driver.flush()
    return llm.engine.scheduler.kv_manager.allocator.used_pages


@contextlib.contextmanager
def limit_free_pages(llm: jfp8kv.LLM, pages: int) -> Iterator[PageAllocator]:
    """Allocate all but `pages` of the free pages in the context."""
    allocator = llm.engine.scheduler.kv_manager.allocator
    taken = allocator.allocate(allocator.free_pages - pages)
    yield allocator
    assert allocator.free_pages == pages
    allocator.release(taken)
