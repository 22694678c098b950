"""Engines of tiny models as many tests want them: the pool holds NaN codes wherever nothing was written."""

import contextlib
from collections.abc import Iterator

import jfp8kv
from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.pool import poison
from tests.models.test_decoder import REFERENCES


def tiny(family: str = "llama_gqa", **options) -> jfp8kv.LLM:
    """A poisoned engine of a reference model in float32, with an E4M3 cache unless `options` say otherwise."""
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    return poisoned(jfp8kv.LLM(params, **{"kv_dtype": "fp8_e4m3"} | options))


def poisoned(llm: jfp8kv.LLM) -> jfp8kv.LLM:
    """The same engine, whatever was in its pool gone."""
    formats = {kind.fmt for kind in llm._engine.cache_config.specs}
    code = 0xFF if len(formats) > 1 else formats.pop().nan_code
    llm._engine.pages = poison(llm._engine.pages, code)
    return llm


def used_pages(llm: jfp8kv.LLM) -> int:
    """Return the number of allocated pages, once cancellations have taken effect."""
    llm._driver.flush()
    return llm._engine.scheduler.kv_manager.allocator.used_pages


@contextlib.contextmanager
def only(llm: jfp8kv.LLM, pages: int) -> Iterator[PageAllocator]:
    """Meanwhile no more than `pages` are free: somebody else holds the rest of the pool."""
    allocator = llm._engine.scheduler.kv_manager.allocator
    held = allocator.allocate(allocator.free_pages - pages)
    yield allocator
    assert allocator.free_pages == pages
    allocator.release(held)
