"""Who owns which page. Plain Python on the host; the device never sees it.

A page is free, or owned by one or more holders (its reference count). Sharing a page between requests is `share`: prefix reuse
and forking are built on it.
"""

from collections import deque

from jfp8kv.core.errors import CapacityError


class PageAllocator:
    """`num_pages` pages, handed out oldest-freed first so that a stale read shows up in tests rather than hides."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._holders = [0] * num_pages

    @property
    def free_pages(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Pages somebody holds, each counted once."""
        return self.num_pages - len(self._free)

    def holders(self, page: int) -> int:
        """How many hold `page`."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, now held once each. Raises `CapacityError`, taking none, when fewer are free."""
        if count > len(self._free):
            raise CapacityError(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free.")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more holder for each of `pages`, all of which are held already."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free and cannot be shared"
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder fewer for each of `pages`; those without any become free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} was freed twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
