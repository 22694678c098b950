"""Texts that are run and not sampled from: those of sessions, which stay in the cache, and those that are scored.

They are run chunk by chunk, each in a dispatch that is waited for. Between two chunks others may have the engine: what a text
has in the cache stays there, and requests that run give their pages up where it needs them.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jfp8kv.core.errors import StepError
from jfp8kv.engine import step
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledPrefill
from jfp8kv.sampling.params import SamplingParams

PREFILL_ONLY = SamplingParams(max_tokens=1)  # of a text that is run, not sampled from

Ran = tuple[
    list[Request], list[range], Any
]  # whose tokens, which positions of each, and what came of them


def prefill_only_request(token_ids: list[int]) -> Request:
    """A text as the engine has it, nothing of which is in the cache."""
    return Request(token_ids, PREFILL_ONLY, np.zeros(2, np.uint32), max_tokens=1)


def logits(engine: Engine, token_ids: list[int]) -> Iterator[np.ndarray]:
    """float32 `[chunk, vocab]` after each token, chunk by chunk, through the cache as in generation."""
    for positions, out in run_chunks(engine, token_ids, step.score):
        yield np.asarray(out)[
            0, : len(positions)
        ]  # cut on the host: the device would compile for each length


def run_chunks(
    engine: Engine, token_ids: list[int], function: Callable, *, scales: Any = None, **static: Any
) -> Iterator[tuple[range, Any]]:
    """Run a text through `function` (a step such as `step.score`) chunk by chunk: the positions, and what it gave.

    That is on the device, and padded: `[requests, tokens, ...]`, of which the first row's first tokens are meant. The text has
    nothing in common with others in the cache, and leaves nothing there.
    """
    engine.free_dropped()
    text = SequenceHandle(engine.scheduler.kv_manager, prefill_only_request(token_ids))
    try:
        for _, (positions,), out in _run(
            engine, [text.request], function, engine.buckets.chunk, scales=scales, **static
        ):
            yield positions, out
    finally:
        engine.dropped.append(
            text
        )  # freed when the engine is at rest, whenever it is that this is given up


def prefill_sessions(
    engine: Engine, holdings: list[SequenceHandle], function: Callable, *, wanted: int = sys.maxsize
) -> Iterator[Ran]:
    """Run through `function` what of sessions' texts is not in the cache, several texts at a time, and keep it there.

    The tokens from position `wanted` on, and the last of each text, are run even where others have them in the cache.
    """
    engine.free_dropped()
    engine.settle()
    for holding in holdings:
        _take_up(engine, holding, wanted)
    yield from _run(
        engine, [holding.request for holding in holdings], function, engine.buckets.session_chunk
    )
    for holding in holdings:
        holding.kv_manager.cache_prefix(holding.request)
    engine.count_used()


def _take_up(engine: Engine, holding: SequenceHandle, wanted: int) -> None:
    """What a session's text has in the cache can be used or is given back; what others have of it is taken over."""
    request, kv_manager = holding.request, engine.scheduler.kv_manager
    if holding.kv_manager is not kv_manager:  # a failed step took all pages
        request.page_tables, holding.kv_manager = [], kv_manager
        request.reset_for_recompute()
    limit = engine.batch_builder.switch_length
    if limit is not None and (request.context <= limit) != (request.num_tokens <= limit):
        kv_manager.release(request)
        request.reset_for_recompute(request.num_tokens)
    if (
        request.uncached > 1
        and (found := kv_manager.match_prefix(request, wanted)).tokens > request.cached
    ):
        kv_manager.adopt_prefix(request, found)


def _run(
    engine: Engine,
    requests: list[Request],
    function: Callable,
    width: Callable[[int], int],
    *,
    scales: Any = None,
    **static: Any,
) -> Iterator[Ran]:
    """Run what is not cached of these texts, as many at a time as go. `width`: of their chunks, for the most tokens that one of
    them has left."""
    scheduler = engine.scheduler
    while left := [r for r in requests if r.uncached]:
        if engine.scheduler is not scheduler:
            raise StepError(
                "a step of another request failed and took what was cached of this text with it: ask again."
            )
        wide = width(max(r.uncached for r in left))
        chosen = left[: engine.buckets.prefill_requests(wide)]
        lengths = [min(r.uncached, wide) for r in chosen]
        engine.settle()  # whoever makes room has nothing on the device then
        for request, length in zip(chosen, lengths, strict=True):
            scheduler.make_room(request, request.cached + length)
        batch = engine.batch_builder.prefill(ScheduledPrefill(chosen, lengths, wide))
        positions = [
            range(r.cached, r.cached + length) for r, length in zip(chosen, lengths, strict=True)
        ]
        yield (
            chosen,
            positions,
            engine.run(function, batch, scales=scales, **static),
        )  # not kept here: it may be large
        for request, length in zip(chosen, lengths, strict=True):
            request.cached += length
