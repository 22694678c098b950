"""The scheduler under random arrivals, over a fake device that records the owner of every slot.

No request is lost, starved or over budget, and no slot is read that belongs to another sequence.
"""

import logging

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.buckets import (
    DECODE_STEPS,
    DECODE_STEPS_DURING_PREFILL,
    Buckets,
    default_prefill_chunk,
    padded_counts,
    step_token_budget,
)
from jfp8kv.engine.request import Request, Status
from jfp8kv.engine.scheduler import Scheduler
from tests.engine.fake_device import (
    PAGE_SIZE,
    FakeDevice,
    check_step,
    continue_alone,
    new_request,
    new_scheduler,
)

# Of one request: tokens of a common prefix, tokens after it, output tokens, and when it arrives.
sizes = st.tuples(
    st.sampled_from([0, 9, 40]), st.integers(1, 110), st.integers(1, 20), st.integers(0, 12)
)


def page_owners(scheduler: Scheduler) -> dict[int, int]:
    """Return how many requests own each page."""
    owners: dict[int, int] = {}
    for request in scheduler.running:
        for table in request.page_tables:
            for page in table.pages:
                owners[page] = owners.get(page, 0) + 1
    return owners


def cancel(scheduler: Scheduler, request: Request) -> bool:
    """Finish the request if it is in the scheduler, and return whether it was."""
    found = request in (*scheduler.waiting, *scheduler.running)
    if found:
        scheduler.finish(request)
    return found


@given(
    sizes=st.lists(sizes, min_size=1, max_size=12),
    pages=st.integers(45, 160),
    prefix_caching=st.booleans(),
    windows=st.booleans(),
    cancelled=st.sets(st.tuples(st.integers(0, 30), st.integers(0, 11)), max_size=3),
)
def test_all_requests_finish_as_if_run_alone_and_all_pages_are_freed(
    sizes, pages, prefix_caching, windows, cancelled
) -> None:
    pages += windows * 45  # the empty pool has room for any one request
    scheduler = new_scheduler(pages, prefix_caching=prefix_caching, windows=windows)
    allocator = scheduler.kv_manager.allocator
    device = FakeDevice(scheduler)
    prefix = np.random.default_rng(1).integers(0, 9, 40).tolist()
    arrivals = [
        (arrival, new_request(prefix[:shared] + [i // 2] * rest, output))
        for i, (shared, rest, output, arrival) in enumerate(sizes)
    ]
    arrivals.sort(key=lambda arrival: arrival[0])
    requests = [request for _, request in arrivals]
    started: list[Request] = []
    dropped: list[Request] = []
    for number in range(4000):
        while arrivals and arrivals[0][0] <= number:
            scheduler.add(arrivals.pop(0)[1])
        for when, index in cancelled:
            if when == number and index < len(requests) and cancel(scheduler, requests[index]):
                dropped.append(requests[index])
        step = scheduler.schedule()
        if step is None:
            if not arrivals:
                break
            continue
        started += [request for request in scheduler.running if request not in started]
        owners = page_owners(scheduler)
        counts = [allocator.ref_count(page) for page in range(pages)]
        assert counts == [owners.get(page, 0) for page in range(pages)]
        assert allocator.used_pages == len(owners) and len(scheduler.running) <= 4
        assert prefix_caching or not scheduler.stats.prefix_hit_tokens
        check_step(step, scheduler)
        device.apply(step)
    assert all(request.status is Status.FINISHED for request in requests)
    for request in requests:
        assert request.output_ids == continue_alone(request.prompt_ids, len(request.output_ids))
        assert request in dropped or len(request.output_ids) == request.max_tokens
    assert allocator.free_pages == pages and not scheduler.running and not scheduler.waiting
    assert started == [request for request in requests if request in started], "first come first"


def test_the_most_recent_request_is_preempted_and_loses_no_tokens(caplog) -> None:
    scheduler = new_scheduler(num_pages=16, prefix_caching=False)
    first, last = new_request([1] * 20, 20), new_request([2] * 20, 20)
    with caplog.at_level(logging.INFO, logger="jfp8kv"):
        FakeDevice(scheduler).run_all(first, last)
    assert scheduler.stats.preemptions > 0
    assert len(first.output_ids) == len(last.output_ids) == 20
    assert last.output_ids == continue_alone(last.prompt_ids, 20)
    preempted = [record for record in caplog.records if "preempted" in record.getMessage()]
    assert len(preempted) == scheduler.stats.preemptions
    assert all(record.levelno == logging.INFO for record in preempted)


def test_a_request_waits_for_free_pages_and_later_ones_do_not_overtake_it() -> None:
    scheduler = new_scheduler(num_pages=10)
    first, big, small = new_request([1] * 20, 4), new_request([2] * 30, 10), new_request([3] * 2, 2)
    for request in (first, big, small):
        scheduler.add(request)
    scheduler.schedule()
    statuses = [request.status for request in (first, big, small)]
    assert statuses == [Status.RUNNING, Status.WAITING, Status.WAITING]
    scheduler.finish(first)
    scheduler.schedule()
    assert big.status is Status.RUNNING


def test_sequences_with_the_same_prefix_share_full_pages(caplog) -> None:
    scheduler = new_scheduler(num_pages=60)
    device, stats = FakeDevice(scheduler), scheduler.stats
    device.run_all(new_request([1] * 22, 3))
    assert stats.prefix_hit_tokens == 0
    with caplog.at_level(logging.DEBUG, logger="jfp8kv"):
        device.run_all(new_request([1] * 22 + [2], 3))
    assert stats.prefix_hit_tokens == 20, "five pages of four; the sixth differs"
    assert "prefix cache hit: 20 of 23 tokens" in caplog.text
    device.run_all(new_request([1] * 20, 3))
    assert stats.prefix_hit_tokens == 36, "the last token always runs"
    device.run_all(new_request([2] + [1] * 22, 3))
    assert stats.prefix_hit_tokens == 36, "another prefix"


def test_output_tokens_are_found_as_the_prefix_of_a_later_prompt() -> None:
    scheduler = new_scheduler(num_pages=60)
    device, first = FakeDevice(scheduler), new_request([1] * 10, 12)
    device.run_all(first)
    device.run_all(new_request([*first.prompt_ids, *first.output_ids, 7, 7], 2))
    assert scheduler.stats.prefix_hit_tokens == 20


@pytest.mark.parametrize("prompt", [41, 43, 3])
@pytest.mark.parametrize("windows", [False, True])
def test_continuations_share_the_prompt_and_copy_its_last_page(prompt, windows) -> None:
    scheduler = new_scheduler(num_pages=160, windows=windows)
    device, copies = FakeDevice(scheduler), []
    for _ in range(4):
        scheduler.add(new_request([5] * prompt, 4))
    while (step := scheduler.schedule()) is not None:
        copies += scheduler.kv_manager.copies
        device.apply(step)
    assert scheduler.stats.prefix_hit_tokens == 3 * (prompt - 1)
    groups = 1 + windows
    partial = (prompt - 1) % PAGE_SIZE
    assert len(copies) == (3 * groups if partial else 0), "the last writer needs no copy"


def test_a_repeated_prompt_is_found_up_to_its_last_token() -> None:
    """The continuation of the first request does not hide the partly filled page."""
    scheduler = new_scheduler(num_pages=60)
    device, stats = FakeDevice(scheduler), scheduler.stats
    for count in range(3):
        device.run_all(new_request([5] * 23, 6))
        assert stats.prefix_hit_tokens == 22 * count
    device.run_all(new_request([5] * 22, 3))
    assert stats.prefix_hit_tokens == 44 + 20, "only full pages match a prompt of another length"


def test_pages_of_a_window_are_shared_only_if_the_whole_window_is_cached() -> None:
    scheduler = new_scheduler(num_pages=60, windows=True)
    device, stats = FakeDevice(scheduler), scheduler.stats
    device.run_all(new_request([1] * 40, 3))
    device.run_all(new_request([1] * 40, 3))
    assert stats.prefix_hit_tokens == 39
    device.run_all(new_request([1] * 16 + [2] * 8, 3))
    assert stats.prefix_hit_tokens == 39 + 16


def test_sequences_whose_rope_depends_on_their_length_share_only_at_equal_length() -> None:
    scheduler = new_scheduler(num_pages=60)
    scheduler.kv_manager.hash_context = True
    device, stats = FakeDevice(scheduler), scheduler.stats
    device.run_all(new_request([1] * 30, 3))
    device.run_all(new_request([1] * 31, 3))
    assert stats.prefix_hit_tokens == 0
    device.run_all(new_request([1] * 31, 3))
    assert stats.prefix_hit_tokens == 30


def test_a_cancelled_request_frees_its_pages_in_any_state() -> None:
    scheduler = new_scheduler(num_pages=10)
    running, waiting = new_request([1] * 20, 4), new_request([2] * 30, 10)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    scheduler.finish(waiting)
    scheduler.finish(running)
    assert scheduler.kv_manager.allocator.free_pages == 10 and scheduler.schedule() is None


def test_a_long_prompt_does_not_stall_a_decoding_request() -> None:
    scheduler = new_scheduler(num_pages=200)
    device, short, long = FakeDevice(scheduler), new_request([1] * 3, 20), new_request([2] * 600, 1)
    scheduler.add(short)
    for _ in range(2):
        device.apply(scheduler.schedule())
    scheduler.add(long)
    before, steps = len(short.output_ids), 0
    while long.prefilling and short.status is Status.RUNNING:
        step = scheduler.schedule()
        check_step(step, scheduler)
        assert step.prefill.width == scheduler.buckets.max_prefill_chunk, "as wide as if alone"
        device.apply(step)
        steps += 1
    assert steps > 5
    assert len(short.output_ids) == min(before + steps * DECODE_STEPS_DURING_PREFILL, 20)


@pytest.mark.parametrize("seqs", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("chunk", [1, 9, 16, 17, 63, 100, 271, 512, 1087, 2048])
def test_padded_chunks_and_a_padded_decode_fit_the_budget(seqs, chunk) -> None:
    buckets = Buckets(seqs, step_token_budget(chunk, seqs), min_decode_rows=2)
    assert buckets.max_prefill_chunk == chunk == max(buckets.chunks)
    decode = buckets.steps(seqs, during_prefill=True) * buckets.decode_rows(seqs)
    for width in buckets.chunks:
        most = buckets.prefill_requests(width)
        prefill = width * buckets.prefill_rows(most, width)
        assert 1 <= most <= seqs and decode + prefill <= buckets.token_budget
        assert chunk < 32 or width >= 16
    for count in range(1, seqs + 1):
        assert 1 <= buckets.steps(count, during_prefill=False) <= DECODE_STEPS
        assert (
            buckets.steps(count, during_prefill=False) * buckets.decode_rows(count)
            <= buckets.token_budget
        )


def test_chunk_widths_halve_twice_and_then_quarter() -> None:
    assert Buckets(64, step_token_budget(512, 64)).chunks == (32, 128, 256, 512)
    assert Buckets(64, step_token_budget(2048, 64)).chunks == (32, 128, 512, 1024, 2048)
    assert Buckets(4, step_token_budget(20, 4)).chunks == (20,)


@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 25), (25, 25), (26, 50), (50, 50), (51, 100), (9999, 100)]
)
def test_a_chunk_is_padded_to_the_narrowest_bucket(tokens, width) -> None:
    assert Buckets(8, step_token_budget(100, 8)).chunk(tokens) == width


def test_batches_are_powers_of_two_and_decode_batches_have_a_minimum() -> None:
    assert [Buckets(8, 64).decode_rows(n) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert [Buckets(16, 64).decode_rows(n, batch_invariant=True) for n in (1, 7, 9)] == [8, 8, 16]
    small = [Buckets(3, 64).decode_rows(n, batch_invariant=True) for n in (1, 3)]
    assert small == [4, 4], "no more than the engine's largest batch"
    two = Buckets(8, 64, min_decode_rows=2)
    assert [two.decode_rows(n) for n in (1, 2, 3)] == [2, 2, 4]
    assert [two.prefill_rows(n, 48) for n in (1, 2, 3)] == [1, 2, 4]
    assert [two.prefill_rows(n, 1) for n in (1, 2, 3)] == [2, 2, 4], "one token is like a decode"
    assert padded_counts(6) == [1, 2, 4, 6] and padded_counts(1) == [1]


def test_a_budget_without_room_for_prompts_is_refused_with_one_that_has() -> None:
    message = "max_num_batched_tokens=128: .* max_num_seqs=64 .* 128 tokens .* at least 144"
    with pytest.raises(ConfigError, match=message):
        Buckets.of(64, 128)
    assert Buckets.of(64, 144).max_prefill_chunk == 16
    assert Buckets.of(64, None).max_prefill_chunk == default_prefill_chunk()


@pytest.mark.parametrize(
    ("budget", "seqs", "widest"),
    [(None, 64, default_prefill_chunk()), (512, 64, 384), (64, 16, 32), (5, 1, 1)],
)
def test_the_number_of_requests_defaults_to_what_the_budget_allows(budget, seqs, widest) -> None:
    buckets = Buckets.of(None, budget)
    assert (buckets.max_requests, buckets.max_prefill_chunk) == (seqs, widest)
