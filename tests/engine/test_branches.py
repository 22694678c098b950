"""Laws of texts that branch, over a fake device that knows what each slot holds: extended, taken back, forked and closed in any
order beside requests that come and go, in pools that are too small, no text reads what is another's, and no page is lost."""

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
from tests.engine.test_scheduler import PAGE, Device, check, next_token, request, scheduler


class Texts:
    """Sessions as the engine keeps them, run by the fake device."""

    def __init__(self, pages: int, *, windows: bool, reuse: bool):
        self.sched = scheduler(pages, windows=windows, reuse=reuse)
        self.kv_manager, self.device = self.sched.kv_manager, Device(self.sched)
        self.texts: list[Request] = []

    def extend(self, text: Request, ids: list[int]) -> None:
        """All or nothing, as a session does it."""
        before = text.num_tokens
        text.prompt_ids += ids
        if (found := self.kv_manager.match_prefix(text)).tokens > text.cached:
            self.kv_manager.adopt_prefix(text, found)
        try:
            while text.uncached:
                chunk = min(text.uncached, 6)
                self.sched.make_room(text, text.cached + chunk)
                self.device.copy()
                self.device.run(text, chunk)
                text.cached += chunk
            self.kv_manager.cache_prefix(text)
        except CapacityError:
            self.rollback(text, text.num_tokens - before)

    def rollback(self, text: Request, tokens: int) -> None:
        left = text.num_tokens - tokens
        del text.prompt_ids[left:], text.page_hashes[left // PAGE :]
        self.kv_manager.truncate(text, left)

    def fork(self, text: Request) -> Request:
        twin = request(list(text.prompt_ids), 1)
        twin.page_tables, twin.cached, twin.page_hashes = (
            self.kv_manager.share(text),
            text.cached,
            list(text.page_hashes),
        )
        return twin

    def turn(self) -> list[Request]:
        """A dispatch for the requests; one for which the texts leave no room is refused, and given back."""
        try:
            if (plan := self.sched.schedule()) is not None:
                check(plan, self.sched)
                self.device.apply(plan)
        except CapacityError:
            refused = self.sched.waiting[0]
            self.sched.finish(refused)
            return [refused]
        return []


class AnyOrder(RuleBasedStateMachine):
    """Requests arrive, are cancelled and run; texts are extended, taken back, forked and closed beside them. Whatever the
    order, slots hold what who reads them expects (`Device`), and at the end all requests have ended as if alone."""

    texts = Bundle("texts")

    @initialize(
        target=texts, pages=st.integers(60, 120), windows=st.booleans(), reuse=st.booleans()
    )
    def begin(self, pages: int, windows: bool, reuse: bool) -> Request:
        self.tree, self.pages = Texts(pages, windows=windows, reuse=reuse), pages
        self.asked: list[Request] = []
        self.gone: list[Request] = []  # cancelled, or refused for want of room
        return self.another([1] * 10)

    def another(self, ids: list[int]) -> Request:
        text = request([], 1)
        self.tree.texts.append(text)
        self.tree.extend(text, ids)
        return text

    @precondition(lambda self: len(self.tree.texts) < 5)
    @rule(target=texts, length=st.integers(1, 30), ids=st.integers(0, 2))
    def open(self, length: int, ids: int) -> Request:
        return self.another([ids] * length)

    @rule(text=texts, ids=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def extend(self, text: Request, ids: list[int]) -> None:
        if text.num_tokens < 60:
            self.tree.extend(text, ids)

    @rule(text=texts, tokens=st.integers(0, 9))
    def rollback(self, text: Request, tokens: int) -> None:
        self.tree.rollback(text, min(tokens, text.num_tokens))

    @precondition(lambda self: len(self.tree.texts) < 5)
    @rule(target=texts, text=texts)
    def fork(self, text: Request) -> Request:
        self.tree.texts.append(self.tree.fork(text))
        return self.tree.texts[-1]

    @rule(text=consumes(texts))
    def close(self, text: Request) -> None:
        self.tree.texts.remove(text)
        self.tree.kv_manager.release(text)

    @precondition(lambda self: len(self.tree.sched.waiting) < 3)
    @rule(
        shared=st.sampled_from([0, 9, 40]),
        own=st.integers(1, 60),
        which=st.integers(0, 2),
        output=st.integers(1, 12),
    )
    def arrive(self, shared: int, own: int, which: int, output: int) -> None:
        self.asked.append(request([1] * shared + [which] * own, output))
        self.tree.sched.add(self.asked[-1])

    @rule(text=texts, which=st.integers(0, 2))
    def go_on_from(self, text: Request, which: int) -> None:
        self.asked.append(request([*text.prompt_ids, which], 3))
        self.tree.sched.add(self.asked[-1])

    @precondition(lambda self: self.tree.sched.waiting or self.tree.sched.running)
    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        there = [*self.tree.sched.waiting, *self.tree.sched.running]
        self.gone.append(there[which % len(there)])
        self.tree.sched.finish(self.gone[-1])

    @rule(turns=st.integers(1, 3))
    def run(self, turns: int) -> None:
        for _ in range(turns):
            self.gone += self.tree.turn()

    @invariant()
    def reference_counts_are_owners_and_no_page_is_free_and_owned(self) -> None:
        allocator = self.tree.kv_manager.allocator
        holders = Counter(
            page
            for r in (*self.tree.texts, *self.tree.sched.running)
            for held in r.page_tables
            for page in held.pages
        )
        assert all(allocator.ref_count(page) == holders[page] for page in range(self.pages))
        assert allocator.used_pages == len(holders)

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for text in self.tree.texts:
            self.tree.kv_manager.release(text)
        while self.tree.sched.waiting or self.tree.sched.running:
            self.gone += self.tree.turn()
        for r in self.asked:
            alone = list(r.prompt_ids)
            for _ in r.output_ids:
                alone.append(next_token(alone))
            assert r.tokens(0, r.num_tokens) == alone and (
                r in self.gone or len(r.output_ids) == r.max_tokens
            )
        assert self.tree.kv_manager.allocator.free_pages == self.pages, "every page came back"


AnyOrder.TestCase.settings = settings(stateful_step_count=30)
test_any_order_of_events_keeps_the_laws = AnyOrder.TestCase


@pytest.mark.parametrize("windows", [False, True])
def test_a_fork_holds_no_more_pages_until_one_of_both_goes_on_and_that_one_copies(windows) -> None:
    tree = Texts(60, windows=windows, reuse=False)
    stem, groups = request([], 1), 1 + windows
    tree.extend(stem, [1] * 10)
    branch = tree.fork(stem)
    tree.texts = [stem, branch]
    used = tree.kv_manager.allocator.used_pages
    assert [h.pages for h in branch.page_tables] == [
        h.pages for h in stem.page_tables
    ] and used == 3 * groups
    tree.extend(branch, [2])
    assert tree.kv_manager.allocator.used_pages == used + groups, "the last page of each group"
    tree.extend(stem, [3])
    assert tree.kv_manager.allocator.used_pages == used + groups, (
        "nobody else holds the stem's last page now"
    )


def test_a_text_taken_back_within_its_own_page_neither_copies_nor_runs_anything_again() -> None:
    tree = Texts(60, windows=False, reuse=True)
    text = request([], 1)
    tree.extend(text, [1] * 12)
    held = [list(h.pages) for h in text.page_tables]
    tree.rollback(text, 2)
    assert text.cached == 10 and [h.pages for h in text.page_tables] == held
    tree.sched.make_room(text, 11)
    assert not tree.kv_manager.copies and [h.pages for h in text.page_tables] == held


def test_what_was_written_over_is_not_found_any_more() -> None:
    tree = Texts(60, windows=False, reuse=True)
    text = request([], 1)
    tree.extend(text, [1] * 12)
    assert tree.kv_manager.match_prefix(request([1] * 13, 1)).tokens == 12
    tree.rollback(text, 2)
    tree.extend(text, [2] * 2)
    assert tree.kv_manager.match_prefix(request([1] * 13, 1)).tokens == 8
    assert tree.kv_manager.match_prefix(request([1] * 10 + [2] * 2 + [1], 1)).tokens == 12


def test_a_window_that_moved_past_the_tokens_a_text_goes_back_to_runs_it_anew() -> None:
    tree = Texts(60, windows=True, reuse=False)
    text = request([], 1)
    tree.extend(text, [1] * 40)
    tree.rollback(text, 3)
    assert text.cached == 37
    tree.rollback(text, 20)
    assert text.cached == 0 and not text.page_tables
    tree.extend(text, [2])
    assert text.cached == 18
