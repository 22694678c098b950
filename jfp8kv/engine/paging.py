"""Which pages a request holds: taken as its text grows, let go where no window reaches, found again where a text begins alike.

What lies in a page never changes while others hold it, so whoever needs the same tokens under the same conditions may hold it
too. Its key says which: a hash of its tokens and of all before them (and of the length that some ropes depend on); the format,
the scales and the weights are those of the engine. Pages that nobody holds any more stay findable until the pool needs them.

Full pages are found, and so is a page filled in part by a text that was run just so far before: `n` continuations of a prompt
run it once, to its last token but one. Whoever writes to a page that others hold copies it first (*copy on write*); that is
noted here and done on the device before the next step. What others have found, or may find, stays as it is.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable

import numpy as np

from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.groups import PageNeeds
from jfp8kv.engine.request import Request


@dataclasses.dataclass
class Held:
    """Pages in a row of a text's pages, of one group of layers: the `first` and those after it. Full ones with numbers below
    `kept` may be found by others."""

    first: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    kept: int = 0

    @property
    def end(self) -> int:
        """The first page not held any more."""
        return self.first + len(self.pages)


@dataclasses.dataclass(frozen=True)
class Found:
    """The first `tokens` of a text, in pages that can be found by these `keys`, and the key of its next page, if it has one."""

    tokens: int = 0
    keys: tuple[bytes, ...] = ()
    following: bytes | None = None


class Paging:
    """The pool's pages as requests hold them.

    `reuse`: whether texts that begin alike share pages. `by_context`: keys depend on `Request.context` (models/rope.py).
    `copies` are pages to be copied on the device before the next step, `(from, to)`, in this order.
    """

    def __init__(self, allocator: PageAllocator, needs: PageNeeds, *, reuse: bool = True, by_context: bool = False):
        self.allocator, self.needs, self.reuse, self.by_context = allocator, needs, reuse, by_context
        self._groups = range(len(needs.groups.windows))
        self.copies: list[tuple[int, int]] = []

    def missing(self, request: Request, stop: int) -> int:
        """Pages more than `request` holds that it needs at any one time until tokens up to `stop` were run."""
        held = request.held or [Held() for _ in self._groups]
        return sum(self._missing(group, each, request.cached, stop) for group, each in enumerate(held))

    def _missing(self, group: int, held: Held, start: int, stop: int) -> int:
        passed = max(0, self.needs.first(group, start) - held.first)
        still = len(held.pages[passed:]) - self._to_copy(held, start)
        freed = sum(self.allocator.holders(page) == 1 for page in held.pages[:passed])
        return max(0, self.needs.between(group, start, stop) - still) - freed

    def _to_copy(self, held: Held, start: int) -> bool:
        """Whether the page that the token at `start` goes to has tokens already, and is others' too."""
        page, slot = divmod(start, self.needs.page_size)
        return slot > 0 and self.allocator.holders(held.pages[page - held.first]) > 1

    def grow(self, request: Request, stop: int) -> bool:
        """Let go of pages no query from here on sees and take those for tokens up to `stop`, the first of them copied if it is
        others' too; False, taking none, if too few are free."""
        if not request.held:
            request.held = [Held() for _ in self._groups]
        for group, held in zip(self._groups, request.held, strict=True):
            first = self.needs.first(group, request.cached)
            passed = max(0, first - held.first)
            self.allocator.release(held.pages[:passed])
            held.first, held.pages = max(held.first, first), held.pages[passed:]
        counts = [max(0, self.needs.holding(stop) - held.end) for held in request.held]
        copies = sum(self._to_copy(held, request.cached) for held in request.held)
        if sum(counts) + copies > self.allocator.free_pages:
            return False
        for held, count in zip(request.held, counts, strict=True):
            self._own(held, request.cached)
            held.pages += self.allocator.allocate(count)
        return True

    def _own(self, held: Held, start: int) -> None:
        """Make the page that the token at `start` goes to its holder's own."""
        page, slot = divmod(start, self.needs.page_size)
        index = page - held.first
        if self._to_copy(held, start):
            (own,) = self.allocator.allocate(1)
            self.copies.append((held.pages[index], own))
            self.allocator.release([held.pages[index]])
            held.pages[index] = own
        elif slot:
            self.allocator.overwrite(held.pages[index], slot)

    def share(self, request: Request) -> list[Held]:
        """What `request` holds of its cached tokens, held by another as well."""
        end = self.needs.holding(request.cached)
        shared = [Held(held.first, held.pages[: end - held.first], held.kept) for held in request.held]
        for held in shared:
            self.allocator.share(held.pages)
        return shared

    def keep_first(self, request: Request, tokens: int) -> None:
        """Let go of all but a text's first `tokens` tokens, and of pages it took to go on; of all of it, if pages that they see
        were let go before."""
        tokens = min(tokens, request.cached)
        if not tokens or any(self.needs.first(group, tokens) < held.first for group, held in enumerate(request.held)):
            self.release(request)
            request.begin_again()
            return
        for held in request.held:
            end = max(0, self.needs.holding(tokens) - held.first)
            self.allocator.release(held.pages[end:])
            del held.pages[end:]
            held.kept = min(held.kept, tokens // self.needs.page_size)
        request.cached = tokens

    def release(self, request: Request) -> None:
        """Take all pages of `request` back."""
        for held in request.held:
            self.allocator.release(held.pages)
        request.held = []

    # -- texts that begin alike -----------------------------------------------------------------------------------------

    def find(self, request: Request, most: int = sys.maxsize) -> Found:
        """What of a request's first tokens is in pages that can be found: at most so many and never its last, whole pages or
        all."""
        if not self.reuse:
            return Found()
        keys = self.keys(request)
        there = 0  # whole texts' groups need every page from the start on
        while there < len(keys) and all(
            self.allocator.find((keys[there], group)) is not None
            for group in self._groups
            if not self.needs.groups.windows[group]
        ):
            there += 1
        ends = [min(pages * self.needs.page_size, request.num_tokens - 1) for pages in range(there, 0, -1)]
        tokens = next((end for end in ends if end <= most and self._has(keys, end)), 0)
        pages = self.needs.holding(tokens)
        return Found(tokens, tuple(keys[:pages]), keys[pages] if pages < len(keys) else None)

    def _has(self, keys: list[bytes], tokens: int) -> bool:
        """Whether a text that goes on after so many tokens finds all that its queries see."""
        return all(
            self.allocator.find((keys[page], group)) is not None
            for group in self._groups
            for page in range(self.needs.first(group, tokens), self.needs.holding(tokens))
        )

    def take_over(self, request: Request, found: Found) -> None:
        """Hold the pages that were found, and nothing else: their tokens are in the cache."""
        self.release(request)
        request.begin_again()
        for group in self._groups:
            first = self.needs.first(group, found.tokens)
            pages = [page for key in found.keys[first:] if (page := self.allocator.find((key, group))) is not None]
            self.allocator.share(pages)
            request.held.append(Held(first, pages, kept=found.tokens // self.needs.page_size))
        request.cached = found.tokens

    def keep(self, request: Request) -> None:
        """What `request` has in full pages may be found by others, and in the last one too before it has made any token."""
        if not self.reuse or not request.held:
            return
        size = self.needs.page_size
        keys = self._full(request, min(request.cached, request.num_tokens))
        for group, held in zip(self._groups, request.held, strict=True):
            for number in range(max(held.first, held.kept), min(held.end, len(keys))):
                self.allocator.keep(held.pages[number - held.first], (keys[number], group), size)
            held.kept = max(held.kept, len(keys))
        page, slots = divmod(request.num_tokens - 1, size)
        if slots and not request.output_ids and request.cached >= request.num_tokens - 1:
            key = self.keys(request)[page]
            for group, held in zip(self._groups, request.held, strict=True):
                self.allocator.keep(held.pages[page - held.first], (key, group), slots)

    def coming(self, requests: Iterable[Request]) -> set[bytes]:
        """Keys of pages that these requests are about to fill with what they were given."""
        if not self.reuse:
            return set()
        return {key for r in requests for key in self.keys(r)[r.cached // self.needs.page_size :]}

    def keys(self, request: Request) -> list[bytes]:
        """A key for each page of all its tokens but the last: for the one that they fill in part, too."""
        tokens = request.num_tokens - 1
        keys, rest = self._full(request, tokens), tokens % self.needs.page_size
        return [*keys, self._key(request, keys, tokens - rest, tokens)] if rest else keys

    def _full(self, request: Request, tokens: int) -> list[bytes]:
        """A key for each full page of the first `tokens` tokens. Computed once."""
        size, known = self.needs.page_size, request.keys
        for page in range(len(known), tokens // size):
            known.append(self._key(request, known, page * size, (page + 1) * size))
        return known[: tokens // size]

    def _key(self, request: Request, known: list[bytes], start: int, stop: int) -> bytes:
        """The key of tokens `start .. stop-1`, after those that the last known key speaks of."""
        before = known[-1] if known else str(request.context if self.by_context else "").encode()
        ids = np.asarray(request.tokens(start, stop), np.int32)
        return hashlib.blake2b(before + ids.tobytes(), digest_size=16).digest()


@dataclasses.dataclass(eq=False)
class Holding:
    """A text that is no request's, and whose pages it holds."""

    paging: Paging
    request: Request

    def fork(self) -> "Holding":
        """The same text, its pages held once more."""
        text = self.request
        twin = Request(list(text.prompt_ids), text.params, text.key, text.max_tokens, context=text.context, cached=text.cached)
        twin.held, twin.keys = self.paging.share(text), list(text.keys)
        return Holding(self.paging, twin)
