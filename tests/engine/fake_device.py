"""A fake device for scheduler tests. It records which sequence each slot belongs to."""

import hashlib

import numpy as np

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.groups import LayerGroups, PageRequirements
from jfp8kv.engine.buckets import DECODE_STEPS_DURING_PREFILL, Buckets
from jfp8kv.engine.kv_manager import KVCacheManager
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledPrefill, Scheduler, SchedulerOutput
from jfp8kv.engine.stats import Stats
from jfp8kv.sampling.params import SamplingParams

PAGE_SIZE = 4
TOKEN_BUDGET = 64
WINDOW = 10
DECODE_STEPS = 5


def new_scheduler(
    num_pages: int,
    *,
    max_requests: int = 4,
    prefix_caching: bool = True,
    windows: bool = False,
) -> Scheduler:
    """Return a scheduler over an empty pool, of one layer group or of two, one with a window."""
    buckets = Buckets(max_requests, TOKEN_BUDGET, decode_steps=DECODE_STEPS, min_decode_rows=2)
    groups = LayerGroups.of([0, WINDOW] if windows else [0, 0])
    requirements = PageRequirements(groups, PAGE_SIZE, max_tokens_per_dispatch=TOKEN_BUDGET)
    kv_manager = KVCacheManager(
        PageAllocator(num_pages), requirements, prefix_caching=prefix_caching
    )
    return Scheduler(kv_manager, buckets, Stats(), max_requests=max_requests)


def new_request(prompt: list[int] | int, output: int) -> Request:
    """Return a request for `output` tokens; a number as prompt stands for that many ones."""
    ids = prompt if isinstance(prompt, list) else [1] * prompt
    params = SamplingParams(max_tokens=output)
    return Request(ids, params, np.zeros(2, np.uint32), max_tokens=output)


def digest(ids: list[int]) -> bytes:
    """Return a hash of a sequence."""
    return hashlib.blake2b(np.int32(ids).tobytes(), digest_size=8).digest()


def next_token(ids: list[int]) -> int:
    """Return the token that the fake model generates: it depends on the whole sequence."""
    return digest(ids)[0]


def continue_alone(prompt: list[int], count: int) -> list[int]:
    """Return the `count` tokens that the fake model generates after `prompt` without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class FakeDevice:
    """Runs steps of a scheduler. A slot of a page stores a hash of the sequence up to its token."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], bytes | None] = {}

    def run(self, request: Request, count: int) -> None:
        """Write the next `count` tokens, then read every slot that the last of them attends to."""
        kv_manager = self.scheduler.kv_manager
        ids = request.tokens(0, request.cached + count)
        for group, table in enumerate(request.page_tables):
            window = kv_manager.requirements.groups.windows[group]
            for position in range(request.cached, request.cached + count):
                page = table.pages[position // PAGE_SIZE - table.first]
                owners = kv_manager.allocator.ref_count(page)
                assert owners == 1, "a page that is written to is not shared"
                self.slots[page, position % PAGE_SIZE] = digest(ids[: position + 1])
            first = max(0, request.cached - window + 1) if window else 0
            for position in range(first, request.cached + count):
                page = table.pages[position // PAGE_SIZE - table.first]
                stored = self.slots[page, position % PAGE_SIZE]
                assert stored == digest(ids[: position + 1]), "a slot belongs to another sequence"

    def copy(self) -> None:
        """Run the recorded page copies."""
        copies = self.scheduler.kv_manager.copies
        for source, target in copies:
            for slot in range(PAGE_SIZE):
                self.slots[target, slot] = self.slots.get((source, slot))
        copies.clear()

    def decode(self, request: Request, steps: int) -> None:
        """Generate a token per step, up to the request's limit."""
        for _ in range(min(steps, request.max_tokens - len(request.output_ids))):
            self.run(request, 1)
            request.cached += 1
            request.output_ids.append(next_token(request.tokens(0, request.num_tokens)))

    def apply(self, step: SchedulerOutput) -> None:
        """Run one scheduler step and commit its tokens."""
        kv_manager = self.scheduler.kv_manager
        self.copy()
        decoding = step.decode.requests if step.decode else []
        for request in decoding:
            self.decode(request, step.decode.steps)
            kv_manager.cache_prefix(request)
        for request, chunk in chunks_of(step.prefill):
            self.run(request, chunk)
            request.cached += chunk
            kv_manager.cache_prefix(request)
        for request in decoding:
            if len(request.output_ids) == request.max_tokens:
                self.scheduler.finish(request)

    def run_all(self, *requests: Request) -> None:
        """Run requests to completion, and check every step."""
        for request in requests:
            self.scheduler.add(request)
        while (step := self.scheduler.schedule()) is not None:
            check_step(step, self.scheduler)
            self.apply(step)


def chunks_of(prefill: ScheduledPrefill | None) -> list[tuple[Request, int]]:
    """Return the requests of a prefill with their chunks."""
    return list(zip(prefill.requests, prefill.chunks, strict=True)) if prefill else []


def check_step(step: SchedulerOutput, scheduler: Scheduler) -> None:
    """Check a step before it runs: who decodes, who prefills, and the token budget."""
    buckets, decode, prefill = scheduler.buckets, step.decode, step.prefill
    tokens = 0
    decoding = [request for request in scheduler.running if not request.prefilling]
    assert (decode.requests if decode else []) == decoding, "all of them get tokens in every step"
    if decode is not None:
        most = DECODE_STEPS_DURING_PREFILL if prefill else DECODE_STEPS
        assert 1 <= decode.steps <= most
        rows = buckets.decode_rows(len(decode.requests), batch_invariant=decode.seeded)
        tokens += rows * decode.steps
    if prefill is not None:
        for request, chunk in chunks_of(prefill):
            assert 0 < chunk <= min(prefill.width, request.uncached - 1)
        oldest = next(request for request in scheduler.running if request.prefilling)
        assert prefill.requests[0] is oldest, "the oldest request is prefilled first"
        assert prefill.width in buckets.chunks
        tokens += buckets.prefill_rows(len(prefill.requests), prefill.width) * prefill.width
    assert 0 < tokens <= TOKEN_BUDGET, "the step fits the budget, padding included"
