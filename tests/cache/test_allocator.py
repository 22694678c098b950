"""No page is lost and none has two owners unless shared: random histories against a plain model."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.core.errors import CapacityError

PAGES, SLOTS = 7, 4


class Histories(RuleBasedStateMachine):
    """Holders take, share, write to and give back pages in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.held: list[list[int]] = []
        self.keys: dict[
            int, tuple[int, int]
        ] = {}  # by key: the page, and how many of its slots it speaks of

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        if count > self.allocator.free_pages:
            before = self.allocator.free_pages
            with pytest.raises(
                CapacityError, match=f"{count} pages requested, {before} of {PAGES}"
            ):
                self.allocator.allocate(count)
            assert self.allocator.free_pages == before
        else:
            pages = self.allocator.allocate(count)
            assert len(set(pages)) == count and not set(pages) & {
                p for held in self.held for p in held
            }
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.allocator.share(pages)
        self.held.append(list(pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data) -> None:
        self.allocator.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.integers(0, 5), slots=st.integers(1, SLOTS))
    def keep(self, data, key: int, slots: int) -> None:
        pages = data.draw(st.sampled_from(self.held))
        if pages:
            page = data.draw(st.sampled_from(pages))
            before = self.allocator.find(key)
            self.allocator.register(page, key, slots)
            if before is not None:
                assert self.allocator.find(key) == before, "a key stays with its page"
            else:
                self.keys[key] = page, slots

    @precondition(lambda self: self.held)
    @rule(data=st.data(), slot=st.integers(0, SLOTS))
    def write(self, data, slot: int) -> None:
        """Keys that speak of what is written over are gone, at once and alone."""
        page = data.draw(st.sampled_from([page for held in self.held for page in held] or [None]))
        if page is not None and self.allocator.ref_count(page) == 1:
            self.allocator.invalidate_from(page, slot)
            self.keys = {
                key: kept for key, kept in self.keys.items() if kept[0] != page or kept[1] <= slot
            }
            assert all(
                (self.allocator.find(key) == page) == (key in self.of(page)) for key in range(6)
            )

    def of(self, page: int) -> list[int]:
        return [key for key, kept in self.keys.items() if kept[0] == page]

    @rule(key=st.integers(0, 5))
    def hold_what_is_found(self, key: int) -> None:
        page = self.allocator.find(key)
        if page is not None:
            self.allocator.share([page])
            self.held.append([page])

    @invariant()
    def what_is_found_is_what_was_kept(self) -> None:
        """A kept page is lost only when somebody else took it, and never while it is held."""
        for key, (page, _) in list(self.keys.items()):
            found = self.allocator.find(key)
            assert found in (page, None)
            if found is None:
                del self.keys[key]
        for key, (page, _) in self.keys.items():
            assert not self.allocator.ref_count(page) or self.allocator.find(key) == page

    @invariant()
    def every_page_is_counted(self) -> None:
        for page in range(PAGES):
            assert self.allocator.ref_count(page) == sum(page in held for held in self.held)
        used = len({p for held in self.held for p in held})
        assert (self.allocator.used_pages, self.allocator.free_pages) == (used, PAGES - used)


TestHistories = Histories.TestCase


def test_what_is_longest_idle_is_forgotten_first_and_free_pages_before_any() -> None:
    allocator = PageAllocator(3)
    a, b, c = allocator.allocate(3)
    for page in (a, b):
        allocator.register(page, f"key of {page}", SLOTS)
    allocator.release([a])
    allocator.release([b, c])
    assert allocator.free_pages == 3
    assert allocator.allocate(1) == [c] and allocator.find(f"key of {a}") == a
    assert allocator.allocate(1) == [a] and allocator.find(f"key of {a}") is None
    allocator.share([b])
    assert allocator.free_pages == 0 and allocator.find(f"key of {b}") == b


def test_freeing_twice_and_sharing_a_free_page_are_bugs_that_assert() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        allocator.share(pages)


def test_a_page_that_others_hold_is_not_written_over() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.share(pages)
    with pytest.raises(AssertionError, match="has 2 owners"):
        allocator.invalidate_from(pages[0], 1)
