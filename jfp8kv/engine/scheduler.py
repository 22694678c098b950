"""Which requests run next. Plain Python, read in a sitting.

First come, first served. A request is admitted when the pool has pages for the most it could ever need, so an admitted request
always finishes. Each turn is one dispatch to the device: a prefill of chunks under a token budget, or a decode of several
tokens for every request that has only its last token left to run. Prefill goes first, since a fuller decode batch costs hardly
more than a thin one, but never more than `PREFILLS_PER_DECODE` times in a row while others wait to decode.
"""

import dataclasses
from collections import deque

from jfp8kv.cache.allocator import PageAllocator
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

    def __init__(self, allocator: PageAllocator, buckets: Buckets, *, page_size: int, max_requests: int):
        self.allocator = allocator
        self.buckets = buckets
        self.page_size = page_size
        self.max_requests = max_requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._prefills = 0

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one request."""
        return -(-tokens // self.page_size)

    def add(self, request: Request) -> None:
        """Queue `request`. The caller has checked that the empty pool could hold it."""
        assert self.pages_for(request.most_tokens) <= self.allocator.num_pages
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take `request` out, whatever its state, and give its pages back."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
            self.allocator.release(request.pages)
            request.pages = []
        request.status = Status.FINISHED

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
            count = self.pages_for(request.most_tokens)
            if count > self.allocator.free_pages:
                return  # its turn comes when others finish; nobody overtakes it
            request.pages = self.allocator.allocate(count)
            request.status = Status.RUNNING
            self.running.append(self.waiting.popleft())

    def _prefill(self, requests: list[Request]) -> Prefill:
        width = self.buckets.chunk(requests[0].uncached - 1)
        chosen = requests[: self.buckets.prefill_requests(width)]
        return Prefill(chosen, [min(r.uncached - 1, width) for r in chosen], width)
