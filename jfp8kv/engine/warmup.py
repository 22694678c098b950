"""Warm-up: compile all step programs before the first request."""

from collections.abc import Iterator

import jax

from jfp8kv.cache.copy import PageCopies
from jfp8kv.engine import step
from jfp8kv.engine.batch import ForwardBatch
from jfp8kv.engine.buckets import padded_counts
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.memory import idle_requests
from jfp8kv.engine.request import PrefillOutput, PromptOutputs
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.sampling.state import FULL, PLAIN


def warmup_steps(
    engine: Engine, *, structured: bool = False, branches: bool = False
) -> Iterator[None]:
    """Compile the step programs, a few before each item of the iterator.

    The programs run requests without pages, so nothing is written to the cache. Samplers for
    requests with more ids than `FULL` has room for are not compiled.

    Args:
      engine: it may run other steps between two items.
      structured: also compile the programs of structured output.
      branches: also compile those that extend several sessions in one dispatch.
    """
    engine.settle()
    buckets = engine.buckets
    for width in buckets.chunks:
        for rows in padded_counts(buckets.prefill_requests(width)):
            engine.run(step.prefill, _idle_chunks(engine, rows, width))
            jax.block_until_ready(engine.prefill(_idle_scoring(rows, width)))
            yield
    for width in (buckets.session_chunk(1), *buckets.chunks):
        engine.programs.program(step.prefill, _idle_chunks(engine, 1, width), engine.pages)
        yield
        if width <= buckets.max_logits_chunk:
            engine.programs.program(step.logits, _idle_chunks(engine, 1, width), engine.pages)
            yield
        for rows in padded_counts(buckets.prefill_requests(width)) if branches else ():
            chunks = _idle_chunks(engine, rows, width)
            engine.programs.program(step.last_logits, chunks, engine.pages)
            yield
    engine.run(step.copy, PageCopies.of([]))
    decodes = (engine.decode, engine.decode_structured) if structured else (engine.decode,)
    for rows in padded_counts(buckets.max_requests):
        for variant in (PLAIN, FULL):
            for decode in decodes:
                jax.block_until_ready(decode(ScheduledDecode(idle_requests(rows), 1), variant))
                yield
    engine.programs.mark_warm()
    engine.stats.compilations = len(engine.programs.compiled)


def _idle_chunks(engine: Engine, rows: int, width: int) -> ForwardBatch:
    """Return a prefill batch of requests without pages."""
    return engine.batch_builder.prefill(ScheduledPrefill(idle_requests(rows), [1] * rows, width))


def _idle_scoring(rows: int, width: int) -> ScheduledPrefill:
    """Return a prefill, of requests without pages, that returns log-probabilities."""
    requests = idle_requests(rows)
    for request in requests:
        request.prompt_outputs = PromptOutputs.logprobs([0])
    return ScheduledPrefill(requests, [1] * rows, width, output=PrefillOutput.LOGPROBS)
