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
from jfp8kv.cache.groups import PageRequirements
from jfp8kv.engine.request import Request


@dataclasses.dataclass
class PageTable:
    """Pages in a row of a text's pages, of one group of layers: the `first` and those after it. Full ones with numbers below
    `registered` may be found by others."""

    first: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    registered: int = 0

    @property
    def end(self) -> int:
        """The first page not held any more."""
        return self.first + len(self.pages)


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """The first `tokens` of a text, in pages that can be found by these `keys`, and the key of its next page, if it has one."""

    tokens: int = 0
    keys: tuple[bytes, ...] = ()
    following: bytes | None = None


class KVCacheManager:
    """The pool's pages as requests hold them.

    `reuse`: whether texts that begin alike share pages. `by_context`: keys depend on `Request.context` (models/rope.py).
    `copies` are pages to be copied on the device before the next step, `(from, to)`, in this order.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        requirements: PageRequirements,
        *,
        reuse: bool = True,
        by_context: bool = False,
    ):
        self.allocator, self.requirements, self.reuse, self.by_context = (
            allocator,
            requirements,
            reuse,
            by_context,
        )
        self._groups = range(len(requirements.groups.windows))
        self.copies: list[tuple[int, int]] = []

    def pages_needed(self, request: Request, stop: int) -> int:
        """Pages more than `request` holds that it needs at any one time until tokens up to `stop` were run."""
        held = request.page_tables or [PageTable() for _ in self._groups]
        return sum(
            self._pages_needed(group, each, request.cached, stop) for group, each in enumerate(held)
        )

    def _pages_needed(self, group: int, held: PageTable, start: int, stop: int) -> int:
        passed = max(0, self.requirements.first_page(group, start) - held.first)
        still = len(held.pages[passed:]) - self._to_copy(held, start)
        freed = sum(self.allocator.ref_count(page) == 1 for page in held.pages[:passed])
        return max(0, self.requirements.pages_between(group, start, stop) - still) - freed

    def _to_copy(self, held: PageTable, start: int) -> bool:
        """Whether the page that the token at `start` goes to has tokens already, and is others' too."""
        page, slot = divmod(start, self.requirements.page_size)
        return slot > 0 and self.allocator.ref_count(held.pages[page - held.first]) > 1

    def allocate(self, request: Request, stop: int) -> bool:
        """Let go of pages no query from here on sees and take those for tokens up to `stop`, the first of them copied if it is
        others' too; False, taking none, if too few are free."""
        if not request.page_tables:
            request.page_tables = [PageTable() for _ in self._groups]
        for group, held in zip(self._groups, request.page_tables, strict=True):
            first = self.requirements.first_page(group, request.cached)
            passed = max(0, first - held.first)
            self.allocator.release(held.pages[:passed])
            held.first, held.pages = max(held.first, first), held.pages[passed:]
        counts = [
            max(0, self.requirements.end_page(stop) - held.end) for held in request.page_tables
        ]
        copies = sum(self._to_copy(held, request.cached) for held in request.page_tables)
        if sum(counts) + copies > self.allocator.free_pages:
            return False
        for held, count in zip(request.page_tables, counts, strict=True):
            self._copy_on_write(held, request.cached)
            held.pages += self.allocator.allocate(count)
        return True

    def _copy_on_write(self, held: PageTable, start: int) -> None:
        """Make the page that the token at `start` goes to its holder's own."""
        page, slot = divmod(start, self.requirements.page_size)
        index = page - held.first
        if self._to_copy(held, start):
            (own,) = self.allocator.allocate(1)
            self.copies.append((held.pages[index], own))
            self.allocator.release([held.pages[index]])
            held.pages[index] = own
        elif slot:
            self.allocator.invalidate_from(held.pages[index], slot)

    def share(self, request: Request) -> list[PageTable]:
        """What `request` holds of its cached tokens, held by another as well."""
        end = self.requirements.end_page(request.cached)
        shared = [
            PageTable(held.first, held.pages[: end - held.first], held.registered)
            for held in request.page_tables
        ]
        for held in shared:
            self.allocator.share(held.pages)
        return shared

    def truncate(self, request: Request, tokens: int) -> None:
        """Let go of all but a text's first `tokens` tokens, and of pages it took to go on; of all of it, if pages that they see
        were let go before."""
        tokens = min(tokens, request.cached)
        if not tokens or any(
            self.requirements.first_page(group, tokens) < held.first
            for group, held in enumerate(request.page_tables)
        ):
            self.release(request)
            request.reset_for_recompute()
            return
        for held in request.page_tables:
            end = max(0, self.requirements.end_page(tokens) - held.first)
            self.allocator.release(held.pages[end:])
            del held.pages[end:]
            held.registered = min(held.registered, tokens // self.requirements.page_size)
        request.cached = tokens

    def release(self, request: Request) -> None:
        """Take all pages of `request` back."""
        for held in request.page_tables:
            self.allocator.release(held.pages)
        request.page_tables = []

    # -- texts that begin alike -----------------------------------------------------------------------------------------

    def match_prefix(self, request: Request, most: int = sys.maxsize) -> PrefixMatch:
        """What of a request's first tokens is in pages that can be found: at most so many and never its last, whole pages or
        all."""
        if not self.reuse:
            return PrefixMatch()
        keys = self.page_hashes(request)
        there = 0  # whole texts' groups need every page from the start on
        while there < len(keys) and all(
            self.allocator.find((keys[there], group)) is not None
            for group in self._groups
            if not self.requirements.groups.windows[group]
        ):
            there += 1
        ends = [
            min(pages * self.requirements.page_size, request.num_tokens - 1)
            for pages in range(there, 0, -1)
        ]
        tokens = next((end for end in ends if end <= most and self._has(keys, end)), 0)
        pages = self.requirements.end_page(tokens)
        return PrefixMatch(tokens, tuple(keys[:pages]), keys[pages] if pages < len(keys) else None)

    def _has(self, keys: list[bytes], tokens: int) -> bool:
        """Whether a text that goes on after so many tokens finds all that its queries see."""
        return all(
            self.allocator.find((keys[page], group)) is not None
            for group in self._groups
            for page in range(
                self.requirements.first_page(group, tokens), self.requirements.end_page(tokens)
            )
        )

    def adopt_prefix(self, request: Request, found: PrefixMatch) -> None:
        """Hold the pages that were found, and nothing else: their tokens are in the cache."""
        self.release(request)
        request.reset_for_recompute()
        for group in self._groups:
            first = self.requirements.first_page(group, found.tokens)
            pages = [
                page
                for key in found.keys[first:]
                if (page := self.allocator.find((key, group))) is not None
            ]
            self.allocator.share(pages)
            request.page_tables.append(
                PageTable(first, pages, registered=found.tokens // self.requirements.page_size)
            )
        request.cached = found.tokens

    def cache_prefix(self, request: Request) -> None:
        """What `request` has in full pages may be found by others, and in the last one too before it has made any token."""
        if not self.reuse or not request.page_tables:
            return
        size = self.requirements.page_size
        keys = self._full(request, min(request.cached, request.num_tokens))
        for group, held in zip(self._groups, request.page_tables, strict=True):
            for number in range(max(held.first, held.registered), min(held.end, len(keys))):
                self.allocator.register(
                    held.pages[number - held.first], (keys[number], group), size
                )
            held.registered = max(held.registered, len(keys))
        page, slots = divmod(request.num_tokens - 1, size)
        if slots and not request.output_ids and request.cached >= request.num_tokens - 1:
            key = self.page_hashes(request)[page]
            for group, held in zip(self._groups, request.page_tables, strict=True):
                self.allocator.register(held.pages[page - held.first], (key, group), slots)

    def pending_prefixes(self, requests: Iterable[Request]) -> set[bytes]:
        """Keys of pages that these requests are about to fill with what they were given."""
        if not self.reuse:
            return set()
        return {
            key
            for r in requests
            for key in self.page_hashes(r)[r.cached // self.requirements.page_size :]
        }

    def page_hashes(self, request: Request) -> list[bytes]:
        """A key for each page of all its tokens but the last: for the one that they fill in part, too."""
        tokens = request.num_tokens - 1
        keys, rest = self._full(request, tokens), tokens % self.requirements.page_size
        return [*keys, self._key(request, keys, tokens - rest, tokens)] if rest else keys

    def _full(self, request: Request, tokens: int) -> list[bytes]:
        """A key for each full page of the first `tokens` tokens. Computed once."""
        size, known = self.requirements.page_size, request.page_hashes
        for page in range(len(known), tokens // size):
            known.append(self._key(request, known, page * size, (page + 1) * size))
        return known[: tokens // size]

    def _key(self, request: Request, known: list[bytes], start: int, stop: int) -> bytes:
        """The key of tokens `start .. stop-1`, after those that the last known key speaks of."""
        before = known[-1] if known else str(request.context if self.by_context else "").encode()
        ids = np.asarray(request.tokens(start, stop), np.int32)
        return hashlib.blake2b(before + ids.tobytes(), digest_size=16).digest()


@dataclasses.dataclass(eq=False)
class SequenceHandle:
    """A text that is no request's, and whose pages it holds."""

    kv_manager: KVCacheManager
    request: Request

    def fork(self) -> "SequenceHandle":
        """The same text, its pages held once more."""
        text = self.request
        twin = Request(
            list(text.prompt_ids),
            text.params,
            text.key,
            text.max_tokens,
            context=text.context,
            cached=text.cached,
        )
        twin.page_tables, twin.page_hashes = self.kv_manager.share(text), list(text.page_hashes)
        return SequenceHandle(self.kv_manager, twin)
