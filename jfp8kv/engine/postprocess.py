"""Post-processing of new tokens, in two phases.

`commit_tokens` is on the critical path, since the device waits for the next step: token ids, the
cached length, and whether the sequence ended by a token or by its length. `emit_output` is
overlapped with the next step: text, stop strings, log-probabilities, page hashes. A stop string
is therefore found one step late, and what the device still computes for its request is dropped.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jfp8kv.engine.batch import NewTokens, StepOutput
from jfp8kv.engine.request import DEAD_END, NO_TOKEN, Request, Status
from jfp8kv.engine.scheduler import ScheduledPrefill, Scheduler
from jfp8kv.engine.stats import Stats


def commit_tokens(new: NewTokens, scheduler: Scheduler, switch_length: int | None) -> bool:
    """Append new tokens to their request, and finish it in the scheduler if they end it.

    Returns False, without effect, for a request that is not running any more. For `switch_length`
    see models/rope.py: a sequence that grows past it is recomputed.
    """
    request = new.request
    if request.status is not Status.RUNNING:
        return False
    request.cached += len(new.token_ids)
    request.output_ids += new.token_ids
    complete = _grammar_complete(new)
    full = len(request.output_ids) >= request.max_tokens
    if new.ended or not new.token_ids or complete or full:
        scheduler.finish(request)
    elif switch_length is not None and request.context <= switch_length < request.num_tokens:
        scheduler.kv_manager.cache_prefix(request)
        scheduler.kv_manager.release(request)
        request.reset_for_recompute(request.num_tokens)
    return True


def emit_output(new: NewTokens, scheduler: Scheduler, stats: Stats) -> None:
    """Add committed tokens to the output of their request, and finish it if it ended."""
    request = new.request
    tokens_before = len(request.output_ids) - len(new.token_ids)
    if request.first_token is None:
        request.first_token = time.perf_counter()
    request.output_logprobs += new.logprobs()
    if request.params.logprobs is not None:
        request.top_logprobs += new.top_logprobs(request.params.logprobs)
    scheduler.kv_manager.cache_prefix(request)
    reason = _append_text(new)
    stats.generated_tokens += len(request.output_ids) - tokens_before
    if reason is None:
        request.notify()
    else:
        finish(request, reason, scheduler)


def finish(request: Request, reason: str, scheduler: Scheduler) -> None:
    """Finish a request in any state, and free the pages it still has."""
    if request.detokenizer is not None and request.detokenizer.stopped is None:
        request.text += request.detokenizer.finish()
    request.finished = time.perf_counter()
    scheduler.finish(request)
    request.finish_reason = reason
    request.notify()


def store_prompt_outputs(
    output: Any, plan: ScheduledPrefill, positions: Sequence[range], scheduler: Scheduler
) -> None:
    """Store a prefill's outputs in its requests, and finish those that requested nothing more."""
    arrays = [np.asarray(array) for array in jax.tree.leaves(output)]
    for row, (request, chunk) in enumerate(zip(plan.requests, positions, strict=True)):
        outputs = request.prompt_outputs
        if outputs is None or request.finish_reason is not None:
            continue
        outputs.store(chunk, [array[row] for array in arrays])
        if request.prefill_only and outputs.complete:
            finish(request, "length", scheduler)


def count_drafts(output: StepOutput, stats: Stats) -> None:
    """Count the draft tokens that a decode verified and accepted."""
    if output.drafts is not None:
        stats.draft_tokens += int(np.asarray(output.drafts.verified).sum())
        stats.accepted_tokens += int(np.asarray(output.drafts.accepted).sum())


def _append_text(new: NewTokens) -> str | None:
    """Append the text of new tokens, truncate at a stop string, and return the finish reason."""
    request = new.request
    detokenizer = request.detokenizer
    if detokenizer is not None:
        request.text += detokenizer.push(new.token_ids[:-1] if new.ended else new.token_ids)
        if detokenizer.stopped is not None:
            _truncate_output(request, detokenizer.tokens_kept)
            request.stop_reason = detokenizer.stopped
            return "stop"
    if new.ended:
        request.stop_reason = new.token_ids[-1]
        return "stop"
    matcher = request.matcher
    if matcher is not None and (matcher.terminated if new.token_ids else matcher.accepting):
        return "stop"
    if not new.token_ids:
        request.stop_reason = (matcher and matcher.error) or NO_TOKEN
        return DEAD_END
    return "length" if len(request.output_ids) >= request.max_tokens else None


def _grammar_complete(new: NewTokens) -> bool:
    """Advance the grammar matcher, and return whether it accepts no further token."""
    matcher = new.request.matcher
    if matcher is None or new.ended:
        return False
    matcher.accept_output(new.request.output_ids)
    return matcher.terminated


def _truncate_output(request: Request, tokens: int) -> None:
    """Drop the output after its first `tokens` tokens."""
    for values in (request.output_ids, request.output_logprobs, request.top_logprobs):
        del values[tokens:]
