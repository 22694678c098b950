"""Prefill of sequences outside the scheduler: sessions, and sequences of quality measurements.

They run chunk by chunk. The caller waits for each dispatch, and between two chunks the engine may
run other steps. Their pages stay allocated. If they need more pages than are free, running requests
are preempted.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from jfp8kv.core.errors import StepError
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledPrefill
from jfp8kv.sampling.params import SamplingParams

PREFILL_ONLY = SamplingParams(max_tokens=1)  # for sequences that are not sampled from

ChunkOutput: TypeAlias = tuple[list[Request], list[range], Any]
"""The requests of a dispatch, the positions of each that it ran, and the output of the step."""


def prefill_only_request(token_ids: list[int]) -> Request:
    """Return a request for a sequence that is not sampled from, with nothing cached."""
    return Request(token_ids, PREFILL_ONLY, np.zeros(2, np.uint32), max_tokens=1)


def run_chunks(
    engine: Engine,
    token_ids: list[int],
    function: Callable[..., Any],
    *,
    scales: Any = None,
    **static: Any,
) -> Iterator[tuple[range, Any]]:
    """Run a sequence through a step that returns logits, and yield `(positions, output)` by chunk.

    The prefix cache is neither read nor written.

    Args:
      engine: runs the step.
      token_ids: the sequence.
      function: a step function, see `Programs.call`.
      scales: replaces the engine's scales, see `Programs.call`.
      **static: static arguments of `function`.

    Yields:
      The positions of a chunk, and the output of the step, on the device and padded to
      `[requests, tokens, ...]`: use row 0 and its first `len(positions)` tokens.
    """
    engine.free_dropped()
    handle = SequenceHandle(engine.scheduler.kv_manager, prefill_only_request(token_ids))
    try:
        chunks = _run(
            engine,
            [handle.request],
            function,
            engine.buckets.logits_chunk,
            scales=scales,
            **static,
        )
        for _, (positions,), output in chunks:
            yield positions, output
    finally:
        engine.dropped.append(handle)  # freed between two steps: this may run in the middle of one


def prefill_sessions(
    engine: Engine,
    handles: list[SequenceHandle],
    function: Callable[..., Any],
    *,
    logits_from: int = sys.maxsize,
) -> Iterator[ChunkOutput]:
    """Run the uncached tokens of sessions through `function`, several sessions per dispatch.

    Tokens from position `logits_from` on are run even if they are in the prefix cache. So is the
    last token of each session. The pages stay allocated and enter the prefix cache.
    """
    buckets = engine.buckets

    def width(tokens: int) -> int:
        chunk = buckets.session_chunk(tokens)
        return chunk if logits_from == sys.maxsize else min(chunk, buckets.max_logits_chunk)

    engine.free_dropped()
    engine.settle()
    for handle in handles:
        _resume(engine, handle, logits_from)
    yield from _run(engine, [handle.request for handle in handles], function, width)
    for handle in handles:
        handle.kv_manager.cache_prefix(handle.request)
    engine.update_usage()


def _resume(engine: Engine, handle: SequenceHandle, logits_from: int) -> None:
    """Drop cached pages that became invalid, and adopt a longer prefix match if there is one."""
    request = handle.request
    kv_manager = engine.scheduler.kv_manager
    if handle.kv_manager is not kv_manager:  # a failed step reset the cache
        request.page_tables = []
        handle.kv_manager = kv_manager
        request.reset_for_recompute()
    limit = engine.batch_builder.switch_length
    if limit is not None and (request.context <= limit) != (request.num_tokens <= limit):
        kv_manager.release(request)
        request.reset_for_recompute(request.num_tokens)
    if request.uncached > 1:
        match = kv_manager.match_prefix(request, logits_from)
        if match.tokens > request.cached:
            kv_manager.adopt_prefix(request, match)


def _run(
    engine: Engine,
    requests: list[Request],
    function: Callable[..., Any],
    width: Callable[[int], int],
    *,
    scales: Any = None,
    **static: Any,
) -> Iterator[ChunkOutput]:
    """Run the uncached tokens of these sequences, as many sequences per dispatch as fit.

    `width` returns the width of a chunk, given the largest number of uncached tokens of a sequence.
    """
    scheduler = engine.scheduler
    while unfinished := [request for request in requests if request.uncached]:
        if engine.scheduler is not scheduler:
            raise StepError("a step of another request failed and reset the KV cache: try again.")
        chunk_width = width(max(request.uncached for request in unfinished))
        chosen = unfinished[: engine.buckets.prefill_requests(chunk_width)]
        chunks = [min(request.uncached, chunk_width) for request in chosen]
        engine.settle()  # a request is preempted only when it has nothing in flight
        for request, chunk in zip(chosen, chunks, strict=True):
            scheduler.make_room(request, request.cached + chunk)
        batch = engine.batch_builder.prefill(ScheduledPrefill(chosen, chunks, chunk_width))
        stops = [request.cached + chunk for request, chunk in zip(chosen, chunks, strict=True)]
        positions = [
            range(request.cached, stop) for request, stop in zip(chosen, stops, strict=True)
        ]
        # The output is not bound to a name here: it may be large.
        yield chosen, positions, engine.run(function, batch, scales=scales, **static)
        for request, stop in zip(chosen, stops, strict=True):
            request.cached = stop
