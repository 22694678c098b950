"""Laws of the scheduler over random arrivals, with a fake device: nothing is lost, starved, or over budget."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.groups import LayerGroups, PageNeeds
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.request import Request, Status
from jfp8kv.engine.scheduler import PREFILLS_PER_DECODE, Decode, Prefill, Scheduler
from jfp8kv.sampling.params import SamplingParams

PAGE, BUDGET = 4, 64
sizes = st.tuples(st.integers(1, 150), st.integers(1, 20), st.integers(0, 12))  # prompt, output, arrival


def scheduler(num_pages: int, max_requests: int = 4) -> Scheduler:
    buckets = Buckets(max_requests, BUDGET, decode_steps=5)
    needs = PageNeeds(LayerGroups.of([0, 0]), PAGE, span=BUDGET)
    return Scheduler(PageAllocator(num_pages), buckets, needs, max_requests=max_requests)


def request(prompt: int, output: int) -> Request:
    return Request([1] * prompt, SamplingParams(max_tokens=output), np.zeros(2, np.uint32), max_tokens=output)


def apply(plan: Prefill | Decode, sched: Scheduler) -> None:
    """What the device would do: cache the chunk, make tokens."""
    for i, r in enumerate(plan.requests):
        if isinstance(plan, Prefill):
            r.cached += plan.chunks[i]
            made = 0
        else:
            made = min(plan.steps, r.max_tokens - len(r.output_ids))
            r.cached += made
        r.output_ids += [2] * made
        if len(r.output_ids) == r.max_tokens:
            sched.finish(r)


@given(sizes=st.lists(sizes, min_size=1, max_size=12), pages=st.integers(43, 120))
def test_every_request_ends_with_all_its_tokens_and_every_page_comes_back(sizes, pages) -> None:
    sched = scheduler(pages)
    coming = sorted(((arrival, request(p, o)) for p, o, arrival in sizes), key=lambda x: x[0])
    everyone, started = [r for _, r in coming], []
    prefills = 0
    for turn in range(2000):
        while coming and coming[0][0] <= turn:
            sched.add(coming.pop(0)[1])
        plan = sched.plan()
        if plan is None:
            if not coming:
                break
            continue
        started += [r for r in sched.running if r not in started]
        held = [p for r in sched.running for group in r.pages for p in group]
        assert len(held) == len(set(held)) == sched.allocator.used_pages and len(sched.running) <= 4
        waiting_to_decode = [r for r in sched.running if not r.prefilling]
        if isinstance(plan, Prefill):
            prefills = prefills + 1 if waiting_to_decode else 0
            assert plan.width * len(plan.requests) <= BUDGET and prefills <= PREFILLS_PER_DECODE + 1
            assert all(0 < c <= min(plan.width, r.uncached - 1) for c, r in zip(plan.chunks, plan.requests, strict=True))
        else:
            prefills = 0
            assert plan.requests == waiting_to_decode and 1 <= plan.steps <= 5
        apply(plan, sched)
    assert all(r.status is Status.FINISHED and len(r.output_ids) == r.max_tokens for r in everyone)
    assert sched.allocator.free_pages == pages and not sched.running and not sched.waiting
    assert started == [r for r in everyone if r in started], "first come, first served"


def test_a_request_waits_until_its_whole_length_fits_and_nobody_overtakes_it() -> None:
    sched = scheduler(num_pages=10)
    first, big, small = request(20, 4), request(30, 10), request(2, 2)
    for r in (first, big, small):
        sched.add(r)
    sched.plan()
    assert [r.status for r in (first, big, small)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    sched.finish(first)
    sched.plan()
    assert big.status is Status.RUNNING and small.status is Status.WAITING


def test_a_cancelled_request_frees_its_pages_in_any_state() -> None:
    sched = scheduler(num_pages=10)
    running, waiting = request(20, 4), request(30, 10)
    sched.add(running)
    sched.add(waiting)
    sched.plan()
    sched.finish(waiting)
    sched.finish(running)
    assert sched.allocator.free_pages == 10 and sched.plan() is None


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (16, 16), (17, 64), (64, 64), (65, 100), (9999, 100)])
def test_a_chunk_takes_the_narrowest_bucket_that_holds_it(tokens, width) -> None:
    assert Buckets(8, 100, 4).chunk(tokens) == width


def test_batches_are_powers_of_two_not_below_the_fewest() -> None:
    assert [Buckets(8, 64, 4).requests(n) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert [Buckets(8, 64, 4, fewest=2).requests(n) for n in (1, 2, 3)] == [2, 2, 4]
    assert Buckets(8, 64, 4).request_counts(6) == [1, 2, 4, 8]
