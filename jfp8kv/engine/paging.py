"""Which pages a request holds: taken as its text grows, let go where no window reaches, found again where a text begins alike.

A full page never changes, so whoever needs the same tokens under the same conditions may hold it too. Its key says which: a
hash of its tokens and of all before them (and of the length that some ropes depend on); the format, the scales and the weights
are those of the engine. Pages that nobody holds any more stay findable until the pool needs them.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.groups import PageNeeds
from jfp8kv.engine.request import Request


@dataclasses.dataclass
class Held:
    """Pages in a row of a text's pages, of one group of layers: the `first` and those after it. Those with numbers below `kept`
    may be found by others."""

    first: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    kept: int = 0

    @property
    def end(self) -> int:
        """The first page not held any more."""
        return self.first + len(self.pages)


class Paging:
    """The pool's pages as requests hold them.

    `reuse`: whether texts that begin alike share pages. `by_context`: keys depend on `Request.context` (models/rope.py).
    """

    def __init__(self, allocator: PageAllocator, needs: PageNeeds, *, reuse: bool = True, by_context: bool = False):
        self.allocator, self.needs, self.reuse, self.by_context = allocator, needs, reuse, by_context
        self._groups = range(len(needs.groups.windows))

    def missing(self, request: Request, stop: int) -> int:
        """Pages more than `request` holds that it needs at any one time until tokens up to `stop` were run."""
        held = request.held or [Held() for _ in self._groups]
        return sum(self._missing(group, each, request.cached, stop) for group, each in enumerate(held))

    def _missing(self, group: int, held: Held, start: int, stop: int) -> int:
        passed = max(0, self.needs.first(group, start) - held.first)
        still = len(held.pages[passed:])
        freed = sum(self.allocator.holders(page) == 1 for page in held.pages[:passed])
        return max(0, self.needs.between(group, start, stop) - still) - freed

    def grow(self, request: Request, stop: int) -> bool:
        """Let go of pages no query from here on sees and take those for tokens up to `stop`; False, taking none, if too few are
        free."""
        if not request.held:
            request.held = [Held() for _ in self._groups]
        for group, held in zip(self._groups, request.held, strict=True):
            first = self.needs.first(group, request.cached)
            passed = max(0, first - held.first)
            self.allocator.release(held.pages[:passed])
            held.first, held.pages = max(held.first, first), held.pages[passed:]
        counts = [max(0, self.needs.holding(stop) - held.end) for held in request.held]
        if sum(counts) > self.allocator.free_pages:
            return False
        for held, count in zip(request.held, counts, strict=True):
            held.pages += self.allocator.allocate(count)
        return True

    def release(self, request: Request) -> None:
        """Take all pages of `request` back."""
        for held in request.held:
            self.allocator.release(held.pages)
        request.held = []

    # -- texts that begin alike -----------------------------------------------------------------------------------------

    def find(self, request: Request) -> int:
        """How many tokens of a request that holds nothing are in pages already: whole pages, and never its last token."""
        if not self.reuse:
            return 0
        keys = self.keys(request, request.num_tokens - 1)
        most = 0  # whole texts' groups need every page from the start on
        while most < len(keys) and all(
            self.allocator.find((keys[most], group)) is not None
            for group in self._groups
            if not self.needs.groups.windows[group]
        ):
            most += 1
        return next((n * self.needs.page_size for n in range(most, 0, -1) if self._has(keys, n)), 0)

    def _has(self, keys: list[bytes], pages: int) -> bool:
        """Whether a text that goes on after so many pages finds all that its queries see."""
        start = pages * self.needs.page_size
        return all(
            self.allocator.find((keys[page], group)) is not None
            for group in self._groups
            for page in range(self.needs.first(group, start), pages)
        )

    def take_over(self, request: Request, tokens: int) -> None:
        """Hold the pages that `find` found: `tokens` tokens are in the cache."""
        assert not request.held and request.cached == 0
        keys, pages = self.keys(request, tokens), tokens // self.needs.page_size
        for group in self._groups:
            first = self.needs.first(group, tokens)
            found = [page for key in keys[first:pages] if (page := self.allocator.find((key, group))) is not None]
            self.allocator.share(found)
            request.held.append(Held(first, found, kept=pages))
        request.cached = tokens

    def keep(self, request: Request) -> None:
        """What `request` has in full pages may be found by others."""
        if not self.reuse or not request.held:
            return
        keys = self.keys(request, min(request.cached, request.num_tokens))
        for group, held in zip(self._groups, request.held, strict=True):
            for number in range(max(held.first, held.kept), min(held.end, len(keys))):
                self.allocator.keep(held.pages[number - held.first], (keys[number], group))
            held.kept = max(held.kept, len(keys))

    def coming(self, requests: Iterable[Request]) -> set[bytes]:
        """Keys of pages that these requests are about to fill with what they were given."""
        if not self.reuse:
            return set()
        size = self.needs.page_size
        return {key for r in requests for key in self.keys(r, r.num_tokens - 1)[r.cached // size :]}

    def keys(self, request: Request, tokens: int) -> list[bytes]:
        """A key for each full page of the first `tokens` tokens. Computed once."""
        size, known = self.needs.page_size, request.keys
        for page in range(len(known), tokens // size):
            before = known[-1] if known else str(request.context if self.by_context else "").encode()
            ids = np.asarray(request.tokens(page * size, (page + 1) * size), np.int32)
            known.append(hashlib.blake2b(before + ids.tobytes(), digest_size=16).digest())
        return known[: tokens // size]
