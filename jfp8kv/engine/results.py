"""What follows from tokens that requests got, in two parts: what the next plan needs, and the rest.

The device stands still for the first, so it is short: ids, how far the cache reaches, whether a text has ended by a token or by
its length. The second is done while the device runs the next turn: texts, stop strings, log-probabilities, keys of full pages.
So a stop string is found a turn late, and what its request has on the device by then is dropped.
"""

import time

from jfp8kv.engine.batch import Made
from jfp8kv.engine.metrics import Stats
from jfp8kv.engine.request import Request, Status
from jfp8kv.engine.scheduler import Scheduler


def book(made: Made, scheduler: Scheduler, switch_length: int | None) -> bool:
    """The first part; False, booking nothing, for a request that was taken out since. `switch_length`: see models/rope.py."""
    request = made.request
    if request.status is not Status.RUNNING:
        return False
    request.cached += len(made.token_ids)
    request.output_ids += made.token_ids
    if made.ended or len(request.output_ids) >= request.max_tokens:
        scheduler.finish(request)
    elif switch_length is not None and request.context <= switch_length < request.num_tokens:
        scheduler.paging.keep(request)
        scheduler.paging.release(request)
        request.begin_again(request.num_tokens)
    return True


def tell(made: Made, scheduler: Scheduler, stats: Stats) -> None:
    """The second part, which its user sees."""
    request, now = made.request, time.perf_counter()
    before = len(request.output_ids) - len(made.token_ids)
    if request.first_token is None:
        request.first_token = now
    request.output_logprobs += made.logprobs()
    if (wanted := request.params.logprobs) is not None:
        request.top_logprobs += made.likeliest(wanted)
    scheduler.paging.keep(request)
    if reason := _finish_reason(made):
        finish(request, reason, scheduler)
        request.finished = now
    stats.generated_tokens += len(request.output_ids) - before


def _finish_reason(made: Made) -> str | None:
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
    return "length" if len(request.output_ids) >= request.max_tokens else None


def _cut(request: Request, tokens: int) -> None:
    """Drop what was generated past a stop string."""
    for made in (request.output_ids, request.output_logprobs, request.top_logprobs):
        del made[tokens:]


def finish(request: Request, reason: str, scheduler: Scheduler) -> None:
    """End its text, and free its pages if that was not done when its last tokens were booked."""
    if request.detokenizer is not None and request.detokenizer.stopped is None:
        request.text += request.detokenizer.finish()
    request.finish_reason = reason
    scheduler.finish(request)
