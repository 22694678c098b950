"""The KV cache manager under forks, over a fake device that records the owner of every slot.

Sequences are extended, rolled back, forked and closed in any order beside requests of the
scheduler, in pools that are too small. No sequence reads another's slots, and no page is lost.
"""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from jfp8kv.core.errors import CapacityError
from jfp8kv.engine.request import Request
from tests.engine.fake_device import (
    PAGE_SIZE,
    FakeDevice,
    check_step,
    continue_alone,
    new_request,
    new_scheduler,
)

MAX_SEQUENCES = 5


class Sequences:
    """Sequences as sessions use them, run by the fake device."""

    def __init__(self, pages: int, *, windows: bool, prefix_caching: bool):
        self.scheduler = new_scheduler(pages, windows=windows, prefix_caching=prefix_caching)
        self.kv_manager = self.scheduler.kv_manager
        self.device = FakeDevice(self.scheduler)
        self.open: list[Request] = []

    def extend(self, sequence: Request, ids: list[int]) -> None:
        """Append tokens and run them. Without room for all of them, append none."""
        before = sequence.num_tokens
        sequence.prompt_ids += ids
        match = self.kv_manager.match_prefix(sequence)
        if match.tokens > sequence.cached:
            self.kv_manager.adopt_prefix(sequence, match)
        try:
            while sequence.uncached:
                chunk = min(sequence.uncached, 6)
                self.scheduler.make_room(sequence, sequence.cached + chunk)
                self.device.copy()
                self.device.run(sequence, chunk)
                sequence.cached += chunk
            self.kv_manager.cache_prefix(sequence)
        except CapacityError:
            self.rollback(sequence, sequence.num_tokens - before)

    def rollback(self, sequence: Request, tokens: int) -> None:
        """Remove the last `tokens` tokens."""
        left = sequence.num_tokens - tokens
        del sequence.prompt_ids[left:], sequence.page_hashes[left // PAGE_SIZE :]
        self.kv_manager.truncate(sequence, left)

    def fork(self, sequence: Request) -> Request:
        """Return a copy that shares all pages."""
        twin = new_request(list(sequence.prompt_ids), 1)
        twin.page_tables = self.kv_manager.share(sequence)
        twin.page_hashes = list(sequence.page_hashes)
        twin.cached = sequence.cached
        return twin

    def step(self) -> list[Request]:
        """Run a scheduler step, and return the request that found too few pages, if any."""
        try:
            step = self.scheduler.schedule()
        except CapacityError:
            refused = self.scheduler.waiting[0]
            self.scheduler.finish(refused)
            return [refused]
        if step is not None:
            check_step(step, self.scheduler)
            self.device.apply(step)
        return []


class AnyOrder(RuleBasedStateMachine):
    """Requests arrive, run and are cancelled while sequences change, in any order.

    `FakeDevice` checks every slot that is read. In the end all requests have the output that they
    would have alone.
    """

    sequences = Bundle("sequences")

    @initialize(
        target=sequences,
        pages=st.integers(60, 120),
        windows=st.booleans(),
        prefix_caching=st.booleans(),
    )
    def start(self, pages: int, windows: bool, prefix_caching: bool) -> Request:
        self.pages = pages
        self.tested = Sequences(pages, windows=windows, prefix_caching=prefix_caching)
        self.requests: list[Request] = []
        self.dropped: list[Request] = []  # cancelled, or refused for lack of pages
        return self.new_sequence([1] * 10)

    def new_sequence(self, ids: list[int]) -> Request:
        sequence = new_request([], 1)
        self.tested.open.append(sequence)
        self.tested.extend(sequence, ids)
        return sequence

    def add(self, ids: list[int], output: int) -> None:
        self.requests.append(new_request(ids, output))
        self.tested.scheduler.add(self.requests[-1])

    @precondition(lambda self: len(self.tested.open) < MAX_SEQUENCES)
    @rule(target=sequences, length=st.integers(1, 30), token=st.integers(0, 2))
    def open(self, length: int, token: int) -> Request:
        return self.new_sequence([token] * length)

    @rule(sequence=sequences, ids=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def extend(self, sequence: Request, ids: list[int]) -> None:
        if sequence.num_tokens < 60:
            self.tested.extend(sequence, ids)

    @rule(sequence=sequences, tokens=st.integers(0, 9))
    def rollback(self, sequence: Request, tokens: int) -> None:
        self.tested.rollback(sequence, min(tokens, sequence.num_tokens))

    @precondition(lambda self: len(self.tested.open) < MAX_SEQUENCES)
    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Request) -> Request:
        self.tested.open.append(self.tested.fork(sequence))
        return self.tested.open[-1]

    @rule(sequence=consumes(sequences))
    def close(self, sequence: Request) -> None:
        self.tested.open.remove(sequence)
        self.tested.kv_manager.release(sequence)

    @precondition(lambda self: len(self.tested.scheduler.waiting) < 3)
    @rule(
        shared=st.sampled_from([0, 9, 40]),
        rest=st.integers(1, 60),
        token=st.integers(0, 2),
        output=st.integers(1, 12),
    )
    def arrive(self, shared: int, rest: int, token: int, output: int) -> None:
        self.add([1] * shared + [token] * rest, output)

    @rule(sequence=sequences, token=st.integers(0, 2))
    def arrive_with_the_prefix_of(self, sequence: Request, token: int) -> None:
        self.add([*sequence.prompt_ids, token], 3)

    @precondition(lambda self: self.tested.scheduler.waiting or self.tested.scheduler.running)
    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        scheduler = self.tested.scheduler
        unfinished = [*scheduler.waiting, *scheduler.running]
        self.dropped.append(unfinished[index % len(unfinished)])
        scheduler.finish(self.dropped[-1])

    @rule(steps=st.integers(1, 3))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.dropped += self.tested.step()

    @invariant()
    def reference_counts_equal_owners_and_owned_pages_are_not_free(self) -> None:
        allocator = self.tested.kv_manager.allocator
        owners = Counter(
            page
            for sequence in (*self.tested.open, *self.tested.scheduler.running)
            for table in sequence.page_tables
            for page in table.pages
        )
        assert all(allocator.ref_count(page) == owners[page] for page in range(self.pages))
        assert allocator.used_pages == len(owners)

    def teardown(self) -> None:
        if not hasattr(self, "tested"):
            return
        scheduler = self.tested.scheduler
        for sequence in self.tested.open:
            self.tested.kv_manager.release(sequence)
        while scheduler.waiting or scheduler.running:
            self.dropped += self.tested.step()
        for request in self.requests:
            output = request.output_ids
            assert output == continue_alone(request.prompt_ids, len(output))
            assert request in self.dropped or len(output) == request.max_tokens
        assert self.tested.kv_manager.allocator.free_pages == self.pages, "all pages are free again"


AnyOrder.TestCase.settings = settings(stateful_step_count=30)
test_any_order_of_events_keeps_the_invariants = AnyOrder.TestCase


def page_lists(sequence: Request) -> list[list[int]]:
    """Return a sequence's page numbers by group."""
    return [list(table.pages) for table in sequence.page_tables]


@pytest.mark.parametrize("windows", [False, True])
def test_a_fork_takes_no_pages_until_one_of_both_is_extended(windows) -> None:
    tested = Sequences(60, windows=windows, prefix_caching=False)
    allocator = tested.kv_manager.allocator
    stem, groups = new_request([], 1), 1 + windows
    tested.extend(stem, [1] * 10)
    branch = tested.fork(stem)
    tested.open = [stem, branch]
    used = allocator.used_pages
    assert page_lists(branch) == page_lists(stem) and used == 3 * groups
    tested.extend(branch, [2])
    assert allocator.used_pages == used + groups, "a copy of the last page of each group"
    tested.extend(stem, [3])
    assert allocator.used_pages == used + groups, "the stem's last page is no longer shared"


def test_a_rollback_within_an_exclusive_page_copies_and_recomputes_nothing() -> None:
    tested = Sequences(60, windows=False, prefix_caching=True)
    sequence = new_request([], 1)
    tested.extend(sequence, [1] * 12)
    pages = page_lists(sequence)
    tested.rollback(sequence, 2)
    assert sequence.cached == 10 and page_lists(sequence) == pages
    tested.scheduler.make_room(sequence, 11)
    assert not tested.kv_manager.copies and page_lists(sequence) == pages


def test_an_overwritten_page_is_not_found_by_its_old_tokens() -> None:
    tested = Sequences(60, windows=False, prefix_caching=True)
    sequence = new_request([], 1)
    tested.extend(sequence, [1] * 12)
    assert tested.kv_manager.match_prefix(new_request([1] * 13, 1)).tokens == 12
    tested.rollback(sequence, 2)
    tested.extend(sequence, [2] * 2)
    assert tested.kv_manager.match_prefix(new_request([1] * 13, 1)).tokens == 8
    extended = new_request([1] * 10 + [2] * 2 + [1], 1)
    assert tested.kv_manager.match_prefix(extended).tokens == 12


def test_a_rollback_past_the_window_recomputes_the_sequence() -> None:
    tested = Sequences(60, windows=True, prefix_caching=False)
    sequence = new_request([], 1)
    tested.extend(sequence, [1] * 40)
    tested.rollback(sequence, 3)
    assert sequence.cached == 37
    tested.rollback(sequence, 20)
    assert sequence.cached == 0 and not sequence.page_tables
    tested.extend(sequence, [2])
    assert sequence.cached == 18
