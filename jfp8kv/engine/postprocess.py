"""What follows from tokens that requests got, in two parts: what the next plan needs, and the rest.

The device stands still for the first, so it is short: ids, how far the cache reaches, whether a text has ended by a token or by
its length. The second is done while the device runs the next turn: texts, stop strings, log-probabilities, keys of full pages.
So a stop string is found a turn late, and what its request has on the device by then is dropped.
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


def commit_tokens(made: NewTokens, scheduler: Scheduler, switch_length: int | None) -> bool:
    """The first part; False, booking nothing, for a request that was taken out since. `switch_length`: see models/rope.py."""
    request = made.request
    if request.status is not Status.RUNNING:
        return False
    request.cached += len(made.token_ids)
    request.output_ids += made.token_ids
    if (
        made.ended
        or not made.token_ids
        or _complete(made)
        or len(request.output_ids) >= request.max_tokens
    ):
        scheduler.finish(request)
    elif switch_length is not None and request.context <= switch_length < request.num_tokens:
        scheduler.kv_manager.cache_prefix(request)
        scheduler.kv_manager.release(request)
        request.reset_for_recompute(request.num_tokens)
    return True


def _complete(made: NewTokens) -> bool:
    """Whether a grammar lets nothing more come."""
    matcher = made.request.matcher
    if matcher is None or made.ended:
        return False
    matcher.read(made.request.output_ids)
    return matcher.complete


def emit_output(made: NewTokens, scheduler: Scheduler, stats: Stats) -> None:
    """The second part, which its user sees."""
    request, now = made.request, time.perf_counter()
    before = len(request.output_ids) - len(made.token_ids)
    if request.first_token is None:
        request.first_token = now
    request.output_logprobs += made.logprobs()
    if (wanted := request.params.logprobs) is not None:
        request.top_logprobs += made.top_logprobs(wanted)
    scheduler.kv_manager.cache_prefix(request)
    reason = _finish_reason(made)
    stats.generated_tokens += len(request.output_ids) - before
    if reason:
        finish(request, reason, scheduler)


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
    """What came of the drafts that a decode verified, if it did."""
    if output.drafts is not None:
        stats.draft_tokens += int(np.asarray(output.drafts.verified).sum())
        stats.accepted_tokens += int(np.asarray(output.drafts.accepted).sum())


def _finish_reason(made: NewTokens) -> str | None:
    request, text = made.request, made.request.detokenizer
    if text is not None:
        request.text += text.push(made.token_ids[:-1] if made.ended else made.token_ids)
        if text.stopped is not None:
            _cut(request, text.tokens_kept)
            request.stop_reason = text.stopped
            return "stop"
    if made.ended:
        request.stop_reason = made.token_ids[-1]
        return "stop"
    matcher = request.matcher
    if matcher is not None and (matcher.complete if made.token_ids else matcher.accepting):
        return "stop"
    if not made.token_ids:
        request.stop_reason = (matcher and matcher.error) or NO_TOKEN
        return DEAD_END
    return "length" if len(request.output_ids) >= request.max_tokens else None


def _cut(request: Request, tokens: int) -> None:
    """Drop what was generated past a stop string."""
    for made in (request.output_ids, request.output_logprobs, request.top_logprobs):
        del made[tokens:]


def finish(request: Request, reason: str, scheduler: Scheduler) -> None:
    """End its text, and free its pages if that was not done when its last tokens were booked."""
    if request.detokenizer is not None and request.detokenizer.stopped is None:
        request.text += request.detokenizer.finish()
    request.finished = time.perf_counter()
    scheduler.finish(request)
    request.finish_reason = reason  # last: whoever sees it takes the rest as final
