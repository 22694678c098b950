"""Laws of the scheduler over random arrivals, with a fake device that knows what each slot holds: nothing is lost, starved,
over budget or read from a slot that holds something else."""

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.groups import LayerGroups, PageRequirements
from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.buckets import (
    DECODE_STEPS,
    DECODE_STEPS_DURING_PREFILL,
    Buckets,
    default_prefill_chunk,
    padded_counts,
    step_token_budget,
)
from jfp8kv.engine.kv_manager import KVCacheManager
from jfp8kv.engine.request import Request, Status
from jfp8kv.engine.scheduler import Scheduler, SchedulerOutput
from jfp8kv.engine.stats import Stats
from jfp8kv.sampling.params import SamplingParams

PAGE, BUDGET, WINDOW = 4, 64, 10
# A prompt is a beginning that others may share and a rest of its own; then its output, and when it arrives.
sizes = st.tuples(
    st.sampled_from([0, 9, 40]), st.integers(1, 110), st.integers(1, 20), st.integers(0, 12)
)


def scheduler(
    num_pages: int, *, max_requests: int = 4, reuse: bool = True, windows: bool = False
) -> Scheduler:
    buckets = Buckets(max_requests, BUDGET, decode_steps=5, min_decode_rows=2)
    requirements = PageRequirements(
        LayerGroups.of([0, WINDOW] if windows else [0, 0]), PAGE, max_tokens_per_dispatch=BUDGET
    )
    return Scheduler(
        KVCacheManager(PageAllocator(num_pages), requirements, prefix_caching=reuse),
        buckets,
        Stats(),
        max_requests=max_requests,
    )


def request(prompt: list[int] | int, output: int) -> Request:
    ids = prompt if isinstance(prompt, list) else [1] * prompt
    return Request(
        ids, SamplingParams(max_tokens=output), np.zeros(2, np.uint32), max_tokens=output
    )


def digest(ids: list[int]) -> bytes:
    return hashlib.blake2b(np.int32(ids).tobytes(), digest_size=8).digest()


def next_token(ids: list[int]) -> int:
    """What the fake model makes of a text: anything, so long as all of the text decides."""
    return digest(ids)[0]


class Device:
    """Slots of pages hold which text they are the end of. Writing and reading go by the pages a request holds."""

    def __init__(self, sched: Scheduler):
        self.sched, self.slots = sched, {}

    def run(self, r: Request, count: int) -> None:
        """The next `count` tokens: written first, then each sees what it should."""
        ids = r.tokens(0, r.cached + count)
        for group, held in enumerate(r.page_tables):
            window = self.sched.kv_manager.requirements.groups.windows[group]
            for position in range(r.cached, r.cached + count):
                page = held.pages[position // PAGE - held.first]
                assert self.sched.kv_manager.allocator.ref_count(page) == 1, (
                    "a page that is written has one owner"
                )
                self.slots[page, position % PAGE] = digest(ids[: position + 1])
            for position in range(max(0, r.cached - window + 1) if window else 0, r.cached + count):
                page = held.pages[position // PAGE - held.first]
                assert self.slots[page, position % PAGE] == digest(ids[: position + 1]), (
                    "a slot holds another text"
                )

    def copy(self) -> None:
        """The pages that were noted, before anything runs."""
        for source, target in self.sched.kv_manager.copies:
            self.slots |= {(target, slot): self.slots.get((source, slot)) for slot in range(PAGE)}
        self.sched.kv_manager.copies.clear()

    def decode(self, r: Request, steps: int) -> None:
        """A token for each step, as far as they are wanted."""
        for _ in range(min(steps, r.max_tokens - len(r.output_ids))):
            self.run(r, 1)
            r.cached += 1
            r.output_ids.append(next_token(r.tokens(0, r.num_tokens)))

    def apply(self, turn: SchedulerOutput) -> None:
        self.copy()
        for r in turn.decode.requests if turn.decode else ():
            self.decode(r, turn.decode.steps)
            self.sched.kv_manager.cache_prefix(r)
        for r, chunk in (
            zip(turn.prefill.requests, turn.prefill.chunks, strict=True) if turn.prefill else ()
        ):
            self.run(r, chunk)
            r.cached += chunk
            self.sched.kv_manager.cache_prefix(r)
        for r in turn.decode.requests if turn.decode else ():
            if len(r.output_ids) == r.max_tokens:
                self.sched.finish(r)


def owned(sched: Scheduler) -> dict[int, int]:
    """How many requests hold each page."""
    holders: dict[int, int] = {}
    for r in sched.running:
        for held in r.page_tables:
            for page in held.pages:
                holders[page] = holders.get(page, 0) + 1
    return holders


def check(turn: SchedulerOutput, sched: Scheduler) -> None:
    """What a turn may be, before it is run."""
    buckets, decode, prefill = sched.buckets, turn.decode, turn.prefill
    tokens = 0
    decoding = [r for r in sched.running if not r.prefilling]
    assert (decode.requests if decode else []) == decoding, "whoever decodes gets tokens every turn"
    if decode is not None:
        assert 1 <= decode.steps <= (DECODE_STEPS_DURING_PREFILL if prefill else 5)
        tokens += (
            buckets.decode_rows(len(decode.requests), batch_invariant=decode.seeded) * decode.steps
        )
    if prefill is not None:
        assert all(
            0 < c <= min(prefill.width, r.uncached - 1)
            for c, r in zip(prefill.chunks, prefill.requests, strict=True)
        )
        assert prefill.requests[0] is next(r for r in sched.running if r.prefilling), (
            "whoever came first is prefilled first"
        )
        assert prefill.width in buckets.chunks
        tokens += buckets.prefill_rows(len(prefill.requests), prefill.width) * prefill.width
    assert 0 < tokens <= BUDGET, "the budget is kept, padding included"


@given(
    sizes=st.lists(sizes, min_size=1, max_size=12),
    pages=st.integers(45, 160),
    reuse=st.booleans(),
    windows=st.booleans(),
    cancelled=st.sets(st.tuples(st.integers(0, 30), st.integers(0, 11)), max_size=3),
)
def test_every_request_ends_as_if_alone_and_every_page_comes_back(
    sizes, pages, reuse, windows, cancelled
) -> None:
    pages += windows * 45  # the empty pool must hold any one of them
    sched = scheduler(pages, reuse=reuse, windows=windows)
    device = Device(sched)
    beginning = np.random.default_rng(1).integers(0, 9, 40).tolist()
    coming = [
        (arrival, request(beginning[:shared] + [i // 2] * own, output))
        for i, (shared, own, output, arrival) in enumerate(sizes)
    ]
    coming.sort(key=lambda x: x[0])
    everyone, started, dropped = [r for _, r in coming], [], []
    for number in range(4000):
        while coming and coming[0][0] <= number:
            sched.add(coming.pop(0)[1])
        for when, which in cancelled:
            if (
                when == number
                and which < len(everyone)
                and everyone[which] in (*sched.waiting, *sched.running)
            ):
                sched.finish(everyone[which])
                dropped.append(everyone[which])
        turn = sched.schedule()
        if turn is None:
            if not coming:
                break
            continue
        started += [r for r in sched.running if r not in started]
        holders, allocator = owned(sched), sched.kv_manager.allocator
        assert all(allocator.ref_count(page) == holders.get(page, 0) for page in range(pages)), (
            "reference counts are owners"
        )
        assert allocator.used_pages == len(holders) and len(sched.running) <= 4
        assert reuse or not sched.stats.prefix_hit_tokens
        check(turn, sched)
        device.apply(turn)
    assert all(r.status is Status.FINISHED for r in everyone)
    for r in everyone:
        alone = list(r.prompt_ids)
        for _ in r.output_ids:
            alone.append(next_token(alone))
        assert r.output_ids == alone[len(r.prompt_ids) :] and (
            r in dropped or len(r.output_ids) == r.max_tokens
        )
    assert (
        sched.kv_manager.allocator.free_pages == pages and not sched.running and not sched.waiting
    )
    assert started == [r for r in everyone if r in started], "first come, first served"


def run_all(device: Device, *requests: Request) -> None:
    for r in requests:
        device.sched.add(r)
    while (turn := device.sched.schedule()) is not None:
        check(turn, device.sched)
        device.apply(turn)


def test_whoever_came_last_makes_room_and_loses_nothing() -> None:
    sched = scheduler(num_pages=16, reuse=False)
    first, last = request([1] * 20, 20), request([2] * 20, 20)
    run_all(Device(sched), first, last)
    assert sched.stats.preemptions > 0
    assert len(first.output_ids) == len(last.output_ids) == 20
    alone = request([2] * 20, 20)
    run_all(Device(scheduler(num_pages=16)), alone)
    assert last.output_ids == alone.output_ids


def test_a_request_waits_for_room_and_nobody_overtakes_it() -> None:
    sched = scheduler(num_pages=10)
    first, big, small = request([1] * 20, 4), request([2] * 30, 10), request([3] * 2, 2)
    for r in (first, big, small):
        sched.add(r)
    sched.schedule()
    assert [r.status for r in (first, big, small)] == [
        Status.RUNNING,
        Status.WAITING,
        Status.WAITING,
    ]
    sched.finish(first)
    sched.schedule()
    assert big.status is Status.RUNNING


def test_texts_that_begin_alike_share_whole_pages_and_run_the_rest() -> None:
    sched = scheduler(num_pages=60)
    device = Device(sched)
    run_all(device, request([1] * 22, 3))
    assert sched.stats.prefix_hit_tokens == 0
    run_all(device, request([1] * 22 + [2], 3))
    assert sched.stats.prefix_hit_tokens == 20, (
        "five pages of four; the rest of the sixth is its own"
    )
    run_all(device, request([1] * 20, 3))
    assert sched.stats.prefix_hit_tokens == 36, "its last token is always run"
    run_all(device, request([2] + [1] * 22, 3))
    assert sched.stats.prefix_hit_tokens == 36, (
        "a text with another beginning has nothing in common"
    )


def test_what_was_generated_is_found_again_as_the_beginning_of_another_prompt() -> None:
    sched = scheduler(num_pages=60)
    device, first = Device(sched), request([1] * 10, 12)
    run_all(device, first)
    run_all(device, request([*first.prompt_ids, *first.output_ids, 7, 7], 2))
    assert sched.stats.prefix_hit_tokens == 20


@pytest.mark.parametrize("prompt", [41, 43, 3])
@pytest.mark.parametrize("windows", [False, True])
def test_continuations_of_one_prompt_run_it_once_and_each_copies_its_last_page(
    prompt, windows
) -> None:
    sched = scheduler(num_pages=160, windows=windows)
    device, samples, made = Device(sched), [request([5] * prompt, 4) for _ in range(4)], []
    for r in samples:
        sched.add(r)
    while (plan := sched.schedule()) is not None:
        made += sched.kv_manager.copies
        device.apply(plan)
    assert sched.stats.prefix_hit_tokens == 3 * (prompt - 1)
    groups = 1 + windows
    assert len(made) == (3 * groups if (prompt - 1) % PAGE else 0), (
        "the last to write has the page to itself"
    )


def test_a_prompt_asked_for_again_is_found_to_its_last_token_though_others_went_on_from_it() -> (
    None
):
    sched = scheduler(num_pages=60)
    device = Device(sched)
    for count in range(3):
        run_all(device, request([5] * 23, 6))
        assert sched.stats.prefix_hit_tokens == 22 * count
    run_all(device, request([5] * 22, 3))
    assert sched.stats.prefix_hit_tokens == 44 + 20, "of other lengths whole pages alone are found"


def test_pages_of_a_window_are_shared_only_if_all_that_it_shows_is_there() -> None:
    sched = scheduler(num_pages=60, windows=True)
    device = Device(sched)
    run_all(device, request([1] * 40, 3))
    run_all(device, request([1] * 40, 3))
    assert sched.stats.prefix_hit_tokens == 39
    run_all(device, request([1] * 16 + [2] * 8, 3))
    assert sched.stats.prefix_hit_tokens == 39 + 16


def test_a_text_whose_ropes_depend_on_its_length_shares_with_its_like_alone() -> None:
    sched = scheduler(num_pages=60)
    device, sched.kv_manager.hash_context = Device(sched), True
    run_all(device, request([1] * 30, 3))
    run_all(device, request([1] * 31, 3))
    assert sched.stats.prefix_hit_tokens == 0
    run_all(device, request([1] * 31, 3))
    assert sched.stats.prefix_hit_tokens == 30


def test_a_cancelled_request_frees_its_pages_in_any_state() -> None:
    sched = scheduler(num_pages=10)
    running, waiting = request([1] * 20, 4), request([2] * 30, 10)
    sched.add(running)
    sched.add(waiting)
    sched.schedule()
    sched.finish(waiting)
    sched.finish(running)
    assert sched.kv_manager.allocator.free_pages == 10 and sched.schedule() is None


def test_a_long_prompt_stalls_nobody() -> None:
    sched = scheduler(num_pages=200)
    device, short, long = Device(sched), request([1] * 3, 20), request([2] * 600, 1)
    sched.add(short)
    device.apply(sched.schedule())
    device.apply(sched.schedule())
    sched.add(long)
    before, turns = len(short.output_ids), 0
    while long.prefilling and short.status is Status.RUNNING:
        turn = sched.schedule()
        check(turn, sched)
        assert turn.prefill.width == sched.buckets.max_prefill_chunk, (
            "and its chunks are as wide as if it were alone"
        )
        device.apply(turn)
        turns += 1
    assert turns > 5 and len(short.output_ids) - before == min(
        turns * DECODE_STEPS_DURING_PREFILL, 20 - before
    )


@pytest.mark.parametrize("seqs", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("chunk", [1, 9, 16, 17, 63, 100, 271, 512, 1087, 2048])
def test_padded_chunks_and_a_padded_decode_fit_the_budget(seqs, chunk) -> None:
    buckets = Buckets(seqs, step_token_budget(chunk, seqs), min_decode_rows=2)
    assert buckets.max_prefill_chunk == chunk == max(buckets.chunks)
    few = buckets.steps(seqs, few=True) * buckets.decode_rows(seqs)
    for width in buckets.chunks:
        most = buckets.prefill_requests(width)
        assert (
            1 <= most <= seqs
            and few + width * buckets.prefill_rows(most, width) <= buckets.token_budget
        )
        assert chunk < 32 or width >= 16
    for count in range(1, seqs + 1):
        assert 1 <= buckets.steps(count, few=False) <= DECODE_STEPS
        assert buckets.steps(count, few=False) * buckets.decode_rows(count) <= buckets.token_budget


def test_widths_halve_twice_and_then_quarter() -> None:
    assert Buckets(64, step_token_budget(512, 64)).chunks == (32, 128, 256, 512)
    assert Buckets(64, step_token_budget(2048, 64)).chunks == (32, 128, 512, 1024, 2048)
    assert Buckets(4, step_token_budget(20, 4)).chunks == (20,)


@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 25), (25, 25), (26, 50), (50, 50), (51, 100), (9999, 100)]
)
def test_a_chunk_takes_the_narrowest_bucket_that_holds_it(tokens, width) -> None:
    assert Buckets(8, step_token_budget(100, 8)).chunk(tokens) == width


def test_batches_are_powers_of_two_and_of_decode_not_below_the_fewest() -> None:
    assert [Buckets(8, 64).decode_rows(n) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert [Buckets(8, 64, min_decode_rows=2).decode_rows(n) for n in (1, 2, 3)] == [2, 2, 4]
    assert [Buckets(16, 64).decode_rows(n, batch_invariant=True) for n in (1, 7, 9)] == [8, 8, 16]
    assert [Buckets(3, 64).decode_rows(n, batch_invariant=True) for n in (1, 3)] == [4, 4], (
        "an engine has no more"
    )
    assert [Buckets(8, 64, min_decode_rows=2).prefill_rows(n, 48) for n in (1, 2, 3)] == [1, 2, 4]
    assert [Buckets(8, 64, min_decode_rows=2).prefill_rows(n, 1) for n in (1, 2, 3)] == [2, 2, 4], (
        "tokens alone are like a decode"
    )
    assert padded_counts(6) == [1, 2, 4, 6] and padded_counts(1) == [1]


def test_a_budget_that_leaves_nothing_for_prompts_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        ConfigError,
        match="max_num_batched_tokens=128: .* max_num_seqs=64 .* 128 tokens .* at least 144",
    ):
        Buckets.of(64, 128)
    assert (
        Buckets.of(64, 144).max_prefill_chunk == 16
        and Buckets.of(64, None).max_prefill_chunk == default_prefill_chunk()
    )


@pytest.mark.parametrize(
    ("budget", "seqs", "widest"),
    [(None, 64, default_prefill_chunk()), (512, 64, 384), (64, 16, 32), (5, 1, 1)],
)
def test_nobody_need_say_how_many_run_at_once(budget, seqs, widest) -> None:
    buckets = Buckets.of(None, budget)
    assert (buckets.max_requests, buckets.max_prefill_chunk) == (seqs, widest)
