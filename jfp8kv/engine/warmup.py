"""Warm-up: compile all step programs before the first request."""

from collections.abc import Iterator

import jax

from jfp8kv.cache.copy import PageCopies
from jfp8kv.cache.pool import KVPool
from jfp8kv.engine import step
from jfp8kv.engine.batch import ForwardBatch
from jfp8kv.engine.buckets import padded_counts
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.forward import prefill_only_request
from jfp8kv.engine.request import PrefillOutput, PromptOutputs, Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.sampling.state import FULL, PLAIN


def warmup_steps(
    engine: Engine, *, structured: bool = False, branches: bool = False
) -> Iterator[None]:
    """Compile the step programs, some for each item of the iterator. See `LLM.warmup`."""
    engine.settle()
    buckets = engine.buckets
    for width in buckets.chunks:
        for rows in padded_counts(buckets.prefill_requests(width)):
            engine.run(step.prefill, _chunks(engine, rows, width))
            plan = ScheduledPrefill(_nobody(rows), [1] * rows, width, output=PrefillOutput.LOGPROBS)
            jax.block_until_ready(engine.prefill(plan))
            yield
    for width in (buckets.session_chunk(1), *buckets.chunks):
        engine.programs.program(step.prefill, _chunks(engine, 1, width), _pool(engine))
        yield
        if width <= buckets.max_logits_chunk:
            engine.programs.program(step.logits, _chunks(engine, 1, width), _pool(engine))
            yield
        for rows in padded_counts(buckets.prefill_requests(width)) if branches else ():
            engine.programs.program(step.last_logits, _chunks(engine, rows, width), _pool(engine))
            yield
    engine.run(step.copy, PageCopies.of([]))
    for rows in padded_counts(buckets.max_requests):
        for variant in (PLAIN, FULL):
            for decode in (
                (engine.decode, engine.decode_structured) if structured else (engine.decode,)
            ):
                jax.block_until_ready(decode(ScheduledDecode(_nobody(rows), 1), variant))
                yield
    engine.programs.mark_warm()
    engine.stats.compilations = len(engine.programs.compiled)


def _chunks(engine: Engine, count: int, width: int) -> ForwardBatch:
    """A chunk for each of so many."""
    return engine.batch_builder.prefill(ScheduledPrefill(_nobody(count), [1] * count, width))


def _nobody(count: int) -> list[Request]:
    """Requests that own no page: running them writes nothing."""
    requests = [prefill_only_request([0]) for _ in range(count)]
    for request in requests:
        request.prompt_outputs = PromptOutputs.logprobs([0])
    return requests


def _pool(engine: Engine) -> KVPool:
    assert engine.pages is not None, "warm-up runs on an engine that is ready"
    return engine.pages
