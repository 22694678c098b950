"""No page is lost and none has two owners unless shared: random histories against a plain model."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.core.errors import CapacityError

PAGES = 7


class Histories(RuleBasedStateMachine):
    """Holders take, share and give back pages in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        if count > self.allocator.free_pages:
            before = self.allocator.free_pages
            with pytest.raises(CapacityError, match=f"{count} pages asked for, {before} of {PAGES}"):
                self.allocator.allocate(count)
            assert self.allocator.free_pages == before
        else:
            pages = self.allocator.allocate(count)
            assert len(set(pages)) == count and not set(pages) & {p for held in self.held for p in held}
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

    @invariant()
    def every_page_is_counted(self) -> None:
        for page in range(PAGES):
            assert self.allocator.holders(page) == sum(page in held for held in self.held)
        used = len({p for held in self.held for p in held})
        assert (self.allocator.used_pages, self.allocator.free_pages) == (used, PAGES - used)


TestHistories = Histories.TestCase


def test_freeing_twice_and_sharing_a_free_page_are_bugs_that_assert() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        allocator.share(pages)
