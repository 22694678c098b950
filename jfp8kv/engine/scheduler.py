"""Which requests run next. Plain Python, read in a sitting.

First come, first served. A request is admitted when the pool has pages for the most it could ever need, so an admitted request
always finishes. Each turn is one dispatch to the device: a prefill of chunks under a token budget, or a decode of several
tokens for every request that has only its last token left to run. Prefill goes first, since a fuller decode batch costs hardly
more than a thin one, but never more than `PREFILLS_PER_DECODE` times in a row while others wait to decode.
"""

import dataclasses
from collections import deque

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.groups import PageNeeds
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.request import Request, Status

PREFILLS_PER_DECODE = 4


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Run the next `chunks[i]` tokens of `requests[i]`, padded to `width`."""

    requests: list[Request]
    chunks: list[int]
    width: int


@dataclasses.dataclass(frozen=True)
class Decode:
    """Generate up to `steps` tokens for each of `requests`."""

    requests: list[Request]
    steps: int


Plan = Prefill | Decode


class Scheduler:
    """Waiting and running requests, and the pages they hold."""

    def __init__(self, allocator: PageAllocator, buckets: Buckets, needs: PageNeeds, *, max_requests: int):
        self.allocator = allocator
        self.buckets = buckets
        self.needs = needs
        self.max_requests = max_requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._prefills = 0

    def add(self, request: Request) -> None:
        """Queue `request`. The caller has checked that the empty pool could hold it."""
        assert self.needs.total(request.most_tokens) <= self.allocator.num_pages
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take `request` out, whatever its state, and give its pages back."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
            self.release(request)
        request.status = Status.FINISHED

    def allocate(self, request: Request, tokens: int) -> None:
        """Give `request` the pages that up to `tokens` tokens need at any one time. Raises `CapacityError`, taking none."""
        counts = self.needs.of(tokens)
        pages = self.allocator.allocate(sum(counts))
        request.pages = [[pages.pop() for _ in range(count)] for count in counts]

    def release(self, request: Request) -> None:
        """Take the pages of `request` back."""
        for pages in request.pages:
            self.allocator.release(pages)
        request.pages = []

    def plan(self) -> Plan | None:
        """The next dispatch, or None when nothing is left to do."""
        self._admit()
        prefilling = [r for r in self.running if r.prefilling]
        decoding = [r for r in self.running if not r.prefilling]
        if prefilling and not (decoding and self._prefills >= PREFILLS_PER_DECODE):
            self._prefills += 1
            return self._prefill(prefilling)
        self._prefills = 0
        if decoding:
            return Decode(decoding, self._steps(decoding))
        assert not self.waiting, "requests wait although nothing runs"
        return None

    def _steps(self, requests: list[Request]) -> int:
        """Tokens per dispatch: one while some request has yet to show its first, then as many as anyone still wants."""
        if any(not r.output_ids for r in requests):
            return 1
        return min(self.buckets.decode_steps, max(r.max_tokens - len(r.output_ids) for r in requests))

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting[0]
            if self.needs.total(request.most_tokens) > self.allocator.free_pages:
                return  # its turn comes when others finish; nobody overtakes it
            self.allocate(request, request.most_tokens)
            request.status = Status.RUNNING
            self.running.append(self.waiting.popleft())

    def _prefill(self, requests: list[Request]) -> Prefill:
        width = self.buckets.chunk(requests[0].uncached - 1)
        chosen = requests[: self.buckets.prefill_requests(width)]
        return Prefill(chosen, [min(r.uncached - 1, width) for r in chosen], width)
