"""The page allocator: reference counts, and pages by hash for the prefix cache. Plain Python.

A page is free, or used by one or more owners (its reference count). A page can be *registered*
under hashes of its contents. When its last owner releases it, a registered page counts as free but
can still be found and shared, until the pool needs it for something else. Eviction is LRU.
"""

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable

from jfp8kv.core.errors import CapacityError


class PageAllocator:
    """Allocator of `num_pages` pages.

    Free pages are allocated before evictable ones, and in the order in which they were freed: quick
    reuse would hide reads of freed pages from tests.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._ref_counts = [0] * num_pages
        self._free = deque(range(num_pages))
        # Registered pages without owners, least recently used first.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._pages: dict[Hashable, int] = {}  # by hash
        # By registered page: its hashes, and the number of slots that each hash covers.
        self._hashes: dict[int, dict[Hashable, int]] = {}

    @property
    def free_pages(self) -> int:
        """Pages without an owner."""
        return len(self._free) + len(self._evictable)

    @property
    def used_pages(self) -> int:
        """Pages with an owner; a shared page counts once."""
        return self.num_pages - self.free_pages

    def ref_count(self, page: int) -> int:
        """Return the number of owners of `page`."""
        return self._ref_counts[page]

    def allocate(self, count: int) -> list[int]:
        """Return `count` free pages with a reference count of 1.

        Raises `CapacityError` if fewer are free, and allocates none.
        """
        if count > self.free_pages:
            raise CapacityError(
                f"{count} pages requested, but only {self.free_pages} of {self.num_pages} are free."
            )
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to each of `pages`, which must be in use or evictable."""
        for page in pages:
            assert self._ref_counts[page] > 0 or page in self._evictable, (
                f"page {page} is free and cannot be shared"
            )
            self._evictable.pop(page, None)
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove an owner from each of `pages`.

        Pages without owners become free or evictable. The last of `pages` is evicted first.
        """
        for page in reversed(list(pages)):
            assert self._ref_counts[page] > 0, f"page {page} was freed twice"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if page in self._hashes:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, page_hash: Hashable, slots: int) -> None:
        """Register the first `slots` slots of a used page under a hash of their contents.

        A hash that is already registered stays with its page.
        """
        assert self._ref_counts[page] > 0, f"page {page} is free and cannot be registered"
        if page_hash not in self._pages:
            self._pages[page_hash] = page
            self._hashes.setdefault(page, {})[page_hash] = slots

    def invalidate_from(self, page: int, slot: int) -> None:
        """Drop the hashes of `page` that cover `slot` or later slots, which will be overwritten.

        The page must have exactly one owner.
        """
        assert self._ref_counts[page] == 1, (
            f"page {page} is written to, but has {self._ref_counts[page]} owners"
        )
        hashes = self._hashes.get(page, {})
        for page_hash in [h for h, slots in hashes.items() if slots > slot]:
            del self._pages[page_hash]
            del hashes[page_hash]
        if not hashes:
            self._hashes.pop(page, None)

    def find(self, page_hash: Hashable) -> int | None:
        """Return the page registered under this hash, or None."""
        return self._pages.get(page_hash)

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        for page_hash in self._hashes.pop(page):
            del self._pages[page_hash]
        return page


@dataclasses.dataclass
class PageTable:
    """The pages of one sequence in one group of layers.

    Attributes:
      first: the index in the sequence of the first page still allocated.
      pages: page numbers in the pool, from `first` on.
      registered: full pages with a lower index are in the prefix cache.
    """

    first: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    registered: int = 0

    @property
    def end(self) -> int:
        """The index behind the last allocated page."""
        return self.first + len(self.pages)
