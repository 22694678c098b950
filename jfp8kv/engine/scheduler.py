"""Continuous batching: which requests run in the next step. Plain Python.

Requests are served first come, first served. A request is admitted when the pool has pages for its
tokens so far and for one more dispatch, on top of what the running requests are about to allocate.
When pages run out, the most recent request is preempted: it loses its pages, waits again, and is
recomputed later. Its output tokens are preserved. The oldest request always makes progress, and the
empty pool has room for any one request, so all requests finish.

Each step decodes every request whose tokens are all cached but the last, and prefills chunks of the
others, under one token budget. Decode comes first. It takes few steps per dispatch while there are
prompts to prefill, so a long prompt does not stall decoding requests.

A request waits while a running request is computing its next page, to share that page
(engine/kv_manager.py).
"""

import dataclasses
from collections import deque
from collections.abc import Callable

from jfp8kv.core.errors import CapacityError
from jfp8kv.core.log import logger
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.kv_manager import KVCacheManager
from jfp8kv.engine.request import PrefillOutput, Request, Status
from jfp8kv.engine.stats import Stats


@dataclasses.dataclass(frozen=True)
class ScheduledPrefill:
    """Run the next `chunks[i]` tokens of `requests[i]`, padded to `width`, and return `output`."""

    requests: list[Request]
    chunks: list[int]
    width: int
    output: PrefillOutput = PrefillOutput.NONE


@dataclasses.dataclass(frozen=True)
class ScheduledDecode:
    """Generate tokens for each of `requests` in up to `steps` decode steps."""

    requests: list[Request]
    steps: int

    @property
    def seeded(self) -> bool:
        """Whether a request has a seed, so its output must not depend on the batch."""
        return any(request.params.seed is not None for request in self.requests)

    def without_preempted(self) -> "ScheduledDecode | None":
        """Return the decode without requests that were preempted since it was planned."""
        running = [request for request in self.requests if request.status is Status.RUNNING]
        return ScheduledDecode(running, self.steps) if running else None


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """What one scheduler step dispatches: the decode first, then the prefill."""

    decode: ScheduledDecode | None
    prefill: ScheduledPrefill | None


class Scheduler:
    """Waiting and running requests, oldest first, and their pages."""

    def __init__(
        self, kv_manager: KVCacheManager, buckets: Buckets, stats: Stats, *, max_requests: int
    ):
        self.kv_manager = kv_manager
        self.buckets = buckets
        self.stats = stats
        self.max_requests = max_requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue `request`. The caller has checked that the empty pool has room for it."""
        pages = self.kv_manager.requirements.total_pages(request.max_num_tokens)
        assert pages <= self.kv_manager.allocator.num_pages
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Remove `request` in any state and free its pages."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self._stop(request)
        request.status = Status.FINISHED

    def schedule(self) -> SchedulerOutput | None:
        """Return the next step with its pages allocated, or None without requests.

        Raises `CapacityError` if open sessions leave too few pages for the first waiting request.
        """
        self._admit()
        while self.running:
            decode = self._decode([r for r in self.running if not r.prefilling])
            prefill = self._prefill([r for r in self.running if r.prefilling])
            # An older request's prefill may have preempted a request of the decode.
            decode = decode.without_preempted() if decode else None
            if decode or prefill:
                return SchedulerOutput(decode, prefill)
        if self.waiting:
            raise self._capacity_error(self._tokens_after_decode(self.waiting[0]))
        return None

    def make_room(self, request: Request, stop: int) -> None:
        """Allocate pages up to `stop` tokens for a sequence outside the scheduler.

        Preempts running requests, most recent first. Raises `CapacityError` if that does not
        suffice.
        """
        while not self.kv_manager.allocate(request, stop):
            if not self.running:
                raise self._capacity_error(stop)
            self._preempt(self.running[-1])

    def _capacity_error(self, tokens: int) -> CapacityError:
        allocator = self.kv_manager.allocator
        return CapacityError(
            f"a sequence of {tokens} tokens needs up to "
            f"{self.kv_manager.requirements.total_pages(tokens)} pages of the KV cache, and "
            f"{allocator.free_pages} of {allocator.num_pages} are free. Open sessions own the "
            "others: close some, or give a larger kv_cache_memory."
        )

    def _admit(self) -> None:
        """Move waiting requests to the running ones, in order, while their pages fit."""
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting[0]
            match = self.kv_manager.match_prefix(request, request.max_prefix)
            pending = self.kv_manager.pending_prefixes(r for r in self.running if r.prefilling)
            if match.next_key in pending:
                return
            self.kv_manager.adopt_prefix(request, match)
            needed = sum(
                self.kv_manager.pages_needed(r, self._tokens_after_decode(r))
                for r in [*self.running, request]
            )
            if needed > self.kv_manager.allocator.free_pages:
                self.kv_manager.release(request)
                request.cached = 0
                return
            if match.tokens:
                logger.debug("prefix cache hit: %d of %d tokens", match.tokens, request.num_tokens)
            self.stats.prefix_hit_tokens += match.tokens
            request.status = Status.RUNNING
            self.running.append(self.waiting.popleft())

    def _tokens_after_decode(self, request: Request) -> int:
        """Return the length of the sequence after its prefill and one decode."""
        new_tokens = self.buckets.max_new_tokens(self.buckets.decode_steps)
        return min(request.num_tokens + new_tokens, request.max_num_tokens)

    def _decode(self, requests: list[Request]) -> ScheduledDecode | None:
        if not requests:
            return None
        first_token = any(not request.output_ids for request in requests)
        during_prefill = first_token or len(requests) < len(self.running)
        seeded = ScheduledDecode(requests, 1).seeded
        steps = self.buckets.steps(
            len(requests), during_prefill=during_prefill, batch_invariant=seeded
        )
        steps = min(steps, max(r.max_tokens - len(r.output_ids) for r in requests))
        if any(request.params.constraint for request in requests):
            steps = 1  # the token bitmask is computed before each token
        new_tokens = self.buckets.max_new_tokens(steps)
        running = self._allocate(requests, lambda r: min(r.cached + new_tokens, r.max_num_tokens))
        return ScheduledDecode(running, steps) if running else None

    def _prefill(self, requests: list[Request]) -> ScheduledPrefill | None:
        if not requests:
            return None
        output = requests[0].prefill_output
        requests = [r for r in requests if r.prefill_output is output]
        width = self.buckets.chunk(requests[0].prefill_tokens)
        if output is PrefillOutput.LOGITS:  # large, so one request at a time
            width = self.buckets.logits_chunk(requests[0].prefill_tokens)
            requests = requests[:1]
        chosen = requests[: self.buckets.prefill_requests(width)]
        chunks = {id(request): min(request.prefill_tokens, width) for request in chosen}
        chosen = self._allocate(chosen, lambda request: request.cached + chunks[id(request)])
        if not chosen:
            return None
        return ScheduledPrefill(
            chosen, [chunks[id(request)] for request in chosen], width, output=output
        )

    def _allocate(self, requests: list[Request], stop: Callable[[Request], int]) -> list[Request]:
        """Allocate pages up to `stop` for each request, and preempt the most recent if needed.

        Returns the requests that are still running.
        """
        for request in requests:
            while request.status is Status.RUNNING and not self.kv_manager.allocate(
                request, stop(request)
            ):
                self._preempt(self.running[-1])
        return [request for request in requests if request.status is Status.RUNNING]

    def _preempt(self, request: Request) -> None:
        """Free the request's pages and put it at the head of the queue, to be recomputed.

        Its full pages can be found in the prefix cache when it returns.
        """
        logger.info(
            "preempted a request after %d tokens: no free page among %d",
            request.num_tokens,
            self.kv_manager.allocator.num_pages,
        )
        self._stop(request)
        request.reset_for_recompute()
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    def _stop(self, request: Request) -> None:
        """Register the request's pages in the prefix cache and free them.

        A step in flight may still write to them. The next owner's writes come later: the device
        runs steps in order.
        """
        self.running.remove(request)
        self.kv_manager.cache_prefix(request)
        self.kv_manager.release(request)
