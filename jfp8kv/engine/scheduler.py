"""Which requests run next. Plain Python, read in a sitting.

First come, first served. A request is admitted when the pool has pages for its text so far and for one dispatch more, beside
what those that run are about to take. Texts grow; when pages run out the one that came last gives its up and waits again, to be
run anew (*preemption*): whoever came first always gets on, and since the empty pool could hold any one request, all end. What a
preempted request had made stays made.

Each turn decodes every request that has only its last token left to run, and beside that prefills chunks of those that have
more, under one budget of tokens. Decode is served first and takes few steps while there is something to prefill: a long prompt
stalls nobody, and whoever decodes gets tokens every turn.

A request whose next page is just being made by another waits for it, to share it (engine/kv_manager.py).
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from jfp8kv.core.errors import CapacityError
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.kv_manager import KVCacheManager
from jfp8kv.engine.request import Request, Status
from jfp8kv.engine.stats import Stats


@dataclasses.dataclass(frozen=True)
class ScheduledPrefill:
    """Run the next `chunks[i]` tokens of `requests[i]`, padded to `width`."""

    requests: list[Request]
    chunks: list[int]
    width: int


@dataclasses.dataclass(frozen=True)
class ScheduledDecode:
    """Generate tokens for each of `requests` in up to `steps` steps."""

    requests: list[Request]
    steps: int

    @property
    def seeded(self) -> bool:
        """Whether a text among them has a seed, and so must not depend on who decodes beside it."""
        return any(request.params.seed is not None for request in self.requests)

    def only_running(self) -> "ScheduledDecode | None":
        """The same without those that were preempted since it was planned."""
        left = [r for r in self.requests if r.status is Status.RUNNING]
        return ScheduledDecode(left, self.steps) if left else None


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """What is dispatched together, decode first; one of them may be None."""

    decode: ScheduledDecode | None
    prefill: ScheduledPrefill | None


class Scheduler:
    """Waiting and running requests, the first come first, and the pages they hold."""

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
        """Queue `request`. The caller has checked that the empty pool could hold it."""
        assert (
            self.kv_manager.requirements.total_pages(request.most_tokens)
            <= self.kv_manager.allocator.num_pages
        )
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take `request` out, whatever its state, and give its pages back."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self._stop(request)
        request.status = Status.FINISHED

    def schedule(self) -> SchedulerOutput | None:
        """The next turn, its pages taken, or None when nothing is left to do."""
        self._admit()
        while self.running:
            decode = self._decode([r for r in self.running if not r.prefilling])
            prefill = self._prefill([r for r in self.running if r.prefilling])
            decode = (
                decode and decode.only_running()
            )  # whoever prefills and came first may have taken pages of who came last
            if decode or prefill:
                return SchedulerOutput(decode, prefill)
        if self.waiting:
            self._refuse(self._soon(self.waiting[0]))
        return None

    def make_room(self, request: Request, stop: int) -> None:
        """Pages for a text that is no request's, up to `stop` tokens; requests that run make room. Raises `CapacityError`."""
        while not self.kv_manager.allocate(request, stop):
            if not self.running:
                self._refuse(stop)
            self._preempt(self.running[-1])

    def _refuse(self, tokens: int) -> NoReturn:
        pages, allocator = (
            self.kv_manager.requirements.total_pages(tokens),
            self.kv_manager.allocator,
        )
        raise CapacityError(
            f"a text of {tokens} tokens needs up to {pages} pages of cache, and {allocator.free_pages} of "
            f"{allocator.num_pages} are free while sessions hold the rest: close some, or give a larger kv_cache_memory."
        )

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting[0]
            found = self.kv_manager.match_prefix(request)
            if found.following in self.kv_manager.pending_prefixes(
                r for r in self.running if r.prefilling
            ):
                return
            self.kv_manager.adopt_prefix(request, found)
            promised = sum(
                self.kv_manager.pages_needed(r, self._soon(r)) for r in (*self.running, request)
            )
            if promised > self.kv_manager.allocator.free_pages:
                self.kv_manager.release(request)
                request.cached = 0
                return  # its turn comes when others finish; nobody overtakes it
            self.stats.prefix_hit_tokens += found.tokens
            request.status = Status.RUNNING
            self.running.append(self.waiting.popleft())

    def _soon(self, request: Request) -> int:
        """Tokens of its text once it has been run so far, and decoded once."""
        return min(
            request.num_tokens + self.buckets.max_new_tokens(self.buckets.decode_steps),
            request.most_tokens,
        )

    def _decode(self, requests: list[Request]) -> ScheduledDecode | None:
        if not requests:
            return None
        first = any(not r.output_ids for r in requests)  # some have yet to show their first token
        few, seeded = (
            first or len(requests) < len(self.running),
            ScheduledDecode(requests, 1).seeded,
        )
        steps = self.buckets.steps(len(requests), few=few, batch_invariant=seeded)
        steps = min(steps, max(r.max_tokens - len(r.output_ids) for r in requests))
        if any(r.params.constraint for r in requests):
            steps = 1  # a grammar has its say before each token
        chosen = self._with_room(
            requests, lambda r: min(r.cached + self.buckets.max_new_tokens(steps), r.most_tokens)
        )
        return ScheduledDecode(chosen, steps) if chosen else None

    def _prefill(self, requests: list[Request]) -> ScheduledPrefill | None:
        if not requests:
            return None
        width = self.buckets.chunk(requests[0].uncached - 1)
        chosen = requests[: self.buckets.prefill_requests(width)]
        chunks = {id(r): min(r.uncached - 1, width) for r in chosen}
        chosen = self._with_room(chosen, lambda r: r.cached + chunks[id(r)])
        return ScheduledPrefill(chosen, [chunks[id(r)] for r in chosen], width) if chosen else None

    def _with_room(self, requests: list[Request], stop: Callable[[Request], int]) -> list[Request]:
        """Those of `requests` that hold pages for their next tokens, up to `stop`; whoever came last makes room."""
        for request in requests:
            while request.status is Status.RUNNING and not self.kv_manager.allocate(
                request, stop(request)
            ):
                self._preempt(self.running[-1])
        return [r for r in requests if r.status is Status.RUNNING]

    def _preempt(self, request: Request) -> None:
        """Back to the head of those that wait, without pages; those that were full may still be found when it returns."""
        self._stop(request)
        request.reset_for_recompute()
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    def _stop(self, request: Request) -> None:
        """Off the device, its pages given back, to be found by others. What is still running there may write to
        them yet; whoever gets them next writes after that, for the device runs in order."""
        self.running.remove(request)
        self.kv_manager.cache_prefix(request)
        self.kv_manager.release(request)
