"""Laws of texts that branch, over a fake device that knows what each slot holds: extended, taken back, forked and closed in any
order beside requests that come and go, in pools that are too small, no text reads what is another's, and no page is lost."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jfp8kv.core.errors import CapacityError
from jfp8kv.engine.request import Request
from tests.engine.test_scheduler import PAGE, Device, request, scheduler

MOVES = ["extend", "extend", "rollback", "fork", "close", "ask", "cancel", "turn", "turn"]
moves = st.tuples(st.sampled_from(MOVES), st.integers(0, 99), st.integers(1, 9))


class Texts:
    """Sessions as the engine keeps them, run by the fake device."""

    def __init__(self, pages: int, *, windows: bool, reuse: bool):
        self.sched = scheduler(pages, windows=windows, reuse=reuse)
        self.paging, self.device = self.sched.paging, Device(self.sched)
        self.texts: list[Request] = []

    def extend(self, text: Request, ids: list[int]) -> None:
        """All or nothing, as a session does it."""
        before = text.num_tokens
        text.prompt_ids += ids
        if (found := self.paging.find(text)).tokens > text.cached:
            self.paging.take_over(text, found)
        try:
            while text.uncached:
                chunk = min(text.uncached, 6)
                self.sched.make_room(text, text.cached + chunk)
                self.device.copy()
                self.device.run(text, chunk)
                text.cached += chunk
            self.paging.keep(text)
        except CapacityError:
            self.rollback(text, text.num_tokens - before)

    def rollback(self, text: Request, tokens: int) -> None:
        left = text.num_tokens - tokens
        del text.prompt_ids[left:], text.keys[left // PAGE :]
        self.paging.keep_first(text, left)

    def fork(self, text: Request) -> Request:
        twin = request(list(text.prompt_ids), 1)
        twin.held, twin.cached, twin.keys = self.paging.share(text), text.cached, list(text.keys)
        return twin

    def turn(self) -> None:
        """A dispatch for the requests; one for which the texts leave no room is refused."""
        try:
            if (plan := self.sched.plan()) is not None:
                self.device.apply(plan)
        except CapacityError:
            self.sched.finish(self.sched.waiting[0])

    def holders(self) -> dict[int, int]:
        held = [page for r in (*self.texts, *self.sched.running) for each in r.held for page in each.pages]
        return {page: held.count(page) for page in held}


@given(pages=st.integers(60, 120), windows=st.booleans(), reuse=st.booleans(), moves=st.lists(moves, min_size=10, max_size=60))
def test_any_tree_of_texts_reads_its_own_tokens_and_gives_every_page_back(pages, windows, reuse, moves) -> None:
    tree = Texts(pages, windows=windows, reuse=reuse)
    allocator = tree.paging.allocator
    tree.texts.append(request([], 1))
    tree.extend(tree.texts[0], [1] * 10)
    for move, which, size in moves:
        text = tree.texts[which % len(tree.texts)] if tree.texts else None
        if move == "ask" and len(tree.sched.waiting) < 3 and text:
            tree.sched.add(request([*text.prompt_ids, which % 2], 3))
        elif move == "turn":
            tree.turn()
        elif move == "cancel" and (asked := [*tree.sched.waiting, *tree.sched.running]):
            tree.sched.finish(asked[which % len(asked)])
        elif text is None or text.num_tokens == 0:
            continue
        elif move == "extend" and text.num_tokens < 60:
            tree.extend(text, [which % 3] * size)
        elif move == "rollback":
            tree.rollback(text, min(size, text.num_tokens - 1))
        elif move == "fork" and len(tree.texts) < 5:
            tree.texts.append(tree.fork(text))
        elif move == "close" and len(tree.texts) > 1:
            tree.texts.remove(text)
            tree.paging.release(text)
        holders = tree.holders()
        assert all(allocator.holders(page) == holders.get(page, 0) for page in range(pages)), "reference counts are owners"
    for text in tree.texts:
        tree.paging.release(text)
    while (plan := tree.sched.plan()) is not None:
        tree.device.apply(plan)
    assert allocator.free_pages == pages


@pytest.mark.parametrize("windows", [False, True])
def test_a_fork_holds_no_more_pages_until_one_of_both_goes_on_and_that_one_copies(windows) -> None:
    tree = Texts(60, windows=windows, reuse=False)
    stem, groups = request([], 1), 1 + windows
    tree.extend(stem, [1] * 10)
    branch = tree.fork(stem)
    tree.texts = [stem, branch]
    used = tree.paging.allocator.used_pages
    assert [h.pages for h in branch.held] == [h.pages for h in stem.held] and used == 3 * groups
    tree.extend(branch, [2])
    assert tree.paging.allocator.used_pages == used + groups, "the last page of each group"
    tree.extend(stem, [3])
    assert tree.paging.allocator.used_pages == used + groups, "nobody else holds the stem's last page now"


def test_a_text_taken_back_within_its_own_page_neither_copies_nor_runs_anything_again() -> None:
    tree = Texts(60, windows=False, reuse=True)
    text = request([], 1)
    tree.extend(text, [1] * 12)
    held = [list(h.pages) for h in text.held]
    tree.rollback(text, 2)
    assert text.cached == 10 and [h.pages for h in text.held] == held
    tree.sched.make_room(text, 11)
    assert not tree.paging.copies and [h.pages for h in text.held] == held


def test_what_was_written_over_is_not_found_any_more() -> None:
    tree = Texts(60, windows=False, reuse=True)
    text = request([], 1)
    tree.extend(text, [1] * 12)
    assert tree.paging.find(request([1] * 13, 1)).tokens == 12
    tree.rollback(text, 2)
    tree.extend(text, [2] * 2)
    assert tree.paging.find(request([1] * 13, 1)).tokens == 8
    assert tree.paging.find(request([1] * 10 + [2] * 2 + [1], 1)).tokens == 12


def test_a_window_that_moved_past_the_tokens_a_text_goes_back_to_runs_it_anew() -> None:
    tree = Texts(60, windows=True, reuse=False)
    text = request([], 1)
    tree.extend(text, [1] * 40)
    tree.rollback(text, 3)
    assert text.cached == 37
    tree.rollback(text, 20)
    assert text.cached == 0 and not text.held
    tree.extend(text, [2])
    assert text.cached == 18
