"""The page allocator: random histories against a simple model. No page is lost or used twice."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.core.errors import CapacityError

PAGES, SLOTS = 7, 4


class Histories(RuleBasedStateMachine):
    """Owners allocate, share, register, overwrite and release pages in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.owned: list[list[int]] = []
        self.registered: dict[int, tuple[int, int]] = {}  # by hash: page and number of slots

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        if count > self.allocator.free_pages:
            before = self.allocator.free_pages
            with pytest.raises(
                CapacityError, match=f"{count} pages requested, but only {before} of"
            ):
                self.allocator.allocate(count)
            assert self.allocator.free_pages == before
        else:
            pages = self.allocator.allocate(count)
            assert len(set(pages)) == count and not set(pages) & {
                p for pages in self.owned for p in pages
            }
            self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data) -> None:
        pages = data.draw(st.sampled_from(self.owned))
        self.allocator.share(pages)
        self.owned.append(list(pages))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data) -> None:
        self.allocator.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), page_hash=st.integers(0, 5), slots=st.integers(1, SLOTS))
    def register(self, data, page_hash: int, slots: int) -> None:
        pages = data.draw(st.sampled_from(self.owned))
        if pages:
            page = data.draw(st.sampled_from(pages))
            before = self.allocator.find(page_hash)
            self.allocator.register(page, page_hash, slots)
            if before is not None:
                assert self.allocator.find(page_hash) == before, "a hash stays with its page"
            else:
                self.registered[page_hash] = page, slots

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), slot=st.integers(0, SLOTS))
    def write(self, data, slot: int) -> None:
        """Hashes that cover overwritten slots are dropped, and no others."""
        page = data.draw(
            st.sampled_from([page for pages in self.owned for page in pages] or [None])
        )
        if page is not None and self.allocator.ref_count(page) == 1:
            self.allocator.invalidate_from(page, slot)
            self.registered = {
                page_hash: (other, slots)
                for page_hash, (other, slots) in self.registered.items()
                if other != page or slots <= slot
            }
            assert all(
                (self.allocator.find(page_hash) == page) == (page_hash in self.hashes_of(page))
                for page_hash in range(6)
            )

    def hashes_of(self, page: int) -> list[int]:
        return [h for h, (other, _) in self.registered.items() if other == page]

    @rule(page_hash=st.integers(0, 5))
    def share_match(self, page_hash: int) -> None:
        page = self.allocator.find(page_hash)
        if page is not None:
            self.allocator.share([page])
            self.owned.append([page])

    @invariant()
    def matches_are_registered_pages(self) -> None:
        """A registered page is lost only by eviction, and never while it has an owner."""
        for page_hash, (page, _) in list(self.registered.items()):
            found = self.allocator.find(page_hash)
            assert found in (page, None)
            if found is None:
                del self.registered[page_hash]
        for page_hash, (page, _) in self.registered.items():
            assert not self.allocator.ref_count(page) or self.allocator.find(page_hash) == page

    @invariant()
    def every_page_is_counted(self) -> None:
        for page in range(PAGES):
            assert self.allocator.ref_count(page) == sum(page in pages for pages in self.owned)
        used = len({p for pages in self.owned for p in pages})
        assert (self.allocator.used_pages, self.allocator.free_pages) == (used, PAGES - used)


TestHistories = Histories.TestCase


def test_free_pages_are_allocated_first_and_eviction_is_lru() -> None:
    allocator = PageAllocator(3)
    a, b, c = allocator.allocate(3)
    for page in (a, b):
        allocator.register(page, f"hash of {page}", SLOTS)
    allocator.release([a])
    allocator.release([b, c])
    assert allocator.free_pages == 3
    assert allocator.allocate(1) == [c] and allocator.find(f"hash of {a}") == a
    assert allocator.allocate(1) == [a] and allocator.find(f"hash of {a}") is None
    allocator.share([b])
    assert allocator.free_pages == 0 and allocator.find(f"hash of {b}") == b


def test_double_release_and_sharing_a_free_page_assert() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        allocator.share(pages)


def test_a_shared_page_must_not_be_overwritten() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.share(pages)
    with pytest.raises(AssertionError, match="has 2 owners"):
        allocator.invalidate_from(pages[0], 1)
