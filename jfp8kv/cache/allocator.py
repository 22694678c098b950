"""Who owns which page. Plain Python on the host; the device never sees it.

A page is free, or owned by one or more holders (its reference count). A page may be *kept* under a key that says what its first
slots hold: when its last holder lets go it counts as free, and yet can be found and held again until the pool needs it for
something else, least recently held first. Sharing, prefix reuse and forking are built on that.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable

from jfp8kv.core.errors import CapacityError


class PageAllocator:
    """`num_pages` pages. Free ones are handed out first, oldest-freed first so that a stale read shows up in tests rather than
    hides; kept ones last."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # kept pages that nobody holds, the longest idle first
        self._holders = [0] * num_pages
        self._pages: dict[Hashable, int] = {}
        self._keys: dict[
            int, dict[Hashable, int]
        ] = {}  # of each kept page, with how many slots they speak of

    @property
    def free_pages(self) -> int:
        """Pages nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def used_pages(self) -> int:
        """Pages somebody holds, each counted once."""
        return self.num_pages - self.free_pages

    def ref_count(self, page: int) -> int:
        """How many hold `page`."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, now held once each. Raises `CapacityError`, taking none, when fewer are free."""
        if count > self.free_pages:
            raise CapacityError(
                f"{count} pages asked for, {self.free_pages} of {self.num_pages} are free."
            )
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages`, all of which are held already, or kept."""
        for page in pages:
            assert self._holders[page] > 0 or page in self._idle, (
                f"page {page} is free and cannot be shared"
            )
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each of `pages`; those without any become free, the last of them the first to be forgotten."""
        for page in reversed(list(pages)):
            assert self._holders[page] > 0, f"page {page} was freed twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: Hashable, slots: int) -> None:
        """The first `slots` slots of `page`, which is held, have what `key` says. A key that another page has stays with that
        page."""
        assert self._holders[page] > 0, f"page {page} is free and holds nothing to keep"
        if key not in self._pages:
            self._pages[key] = page
            self._keys.setdefault(page, {})[key] = slots

    def invalidate_from(self, page: int, slot: int) -> None:
        """`page`, which one holds, will be written from `slot` on: keys that speak of more than what lies before are gone."""
        assert self._holders[page] == 1, (
            f"page {page} is written to, and {self._holders[page]} hold it"
        )
        keys = self._keys.get(page, {})
        for key in [key for key, slots in keys.items() if slots > slot]:
            del self._pages[key], keys[key]
        if not keys:
            self._keys.pop(page, None)

    def find(self, key: Hashable) -> int | None:
        """The page that has what `key` says, held or kept; None when there is none any more."""
        return self._pages.get(key)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        for key in self._keys.pop(page):
            del self._pages[key]
        return page
