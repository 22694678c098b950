"""The KV cache manager: page tables, the prefix cache, and copy-on-write.

A page is allocated as its sequence grows, and freed when no later query can see it (sliding
windows). Full pages are registered in the prefix cache under a hash of their tokens and of all
tokens before them, so sequences with the same prefix share them. Formats, scales and weights are
the same for all sequences of an engine and take no part in the hash. Pages that no sequence owns
stay in the prefix cache until they are evicted.

A partly filled page is registered as well, while its sequence has no output: `n` continuations of a
prompt prefill it once, up to its last token but one. A sequence that writes to a shared page first
copies it (copy-on-write). The manager records the copy, and the engine runs it before the next
step.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable

import numpy as np

from jfp8kv.cache.allocator import PageAllocator, PageTable
from jfp8kv.cache.groups import PageRequirements
from jfp8kv.engine.request import Request


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix of a sequence.

    Attributes:
      tokens: its length.
      keys: the keys of its pages in the prefix cache.
      next_key: the key of the next page of the sequence; None if that page may not be reused.
    """

    tokens: int = 0
    keys: tuple[bytes, ...] = ()
    next_key: bytes | None = None


class KVCacheManager:
    """Allocates the pool's pages to sequences.

    Args:
      allocator: the pool's pages.
      requirements: which pages a sequence needs.
      prefix_caching: whether sequences with the same prefix share pages.
      hash_context: whether keys depend on `Request.context` (models/rope.py).

    Attributes:
      copies: pages to copy on the device before the next step, `(source, target)` in order.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        requirements: PageRequirements,
        *,
        prefix_caching: bool = True,
        hash_context: bool = False,
    ):
        self.allocator = allocator
        self.requirements = requirements
        self.prefix_caching = prefix_caching
        self.hash_context = hash_context
        self.copies: list[tuple[int, int]] = []
        self._groups = range(len(requirements.groups.windows))

    # Allocation

    def pages_needed(self, request: Request, stop: int) -> int:
        """Return an upper bound on the free pages that running the tokens up to `stop` takes."""
        tables = request.page_tables or [PageTable() for _ in self._groups]
        return sum(
            self._pages_needed(group, table, request.cached, stop)
            for group, table in enumerate(tables)
        )

    def _pages_needed(self, group: int, table: PageTable, start: int, stop: int) -> int:
        out_of_window = max(0, self.requirements.first_page(group, start) - table.first)
        usable = len(table.pages[out_of_window:]) - self._needs_copy(table, start)
        freed = sum(self.allocator.ref_count(page) == 1 for page in table.pages[:out_of_window])
        return max(0, self.requirements.pages_between(group, start, stop) - usable) - freed

    def allocate(self, request: Request, stop: int) -> bool:
        """Allocate the pages for tokens up to `stop`, and free those that no later query can see.

        If the next token goes to a shared page, that page is copied first. Returns False, and
        allocates nothing, if too few pages are free.
        """
        if not request.page_tables:
            request.page_tables = [PageTable() for _ in self._groups]
        for group, table in enumerate(request.page_tables):
            first = self.requirements.first_page(group, request.cached)
            out_of_window = max(0, first - table.first)
            self.allocator.release(table.pages[:out_of_window])
            table.first = max(table.first, first)
            table.pages = table.pages[out_of_window:]
        end = self.requirements.end_page(stop)
        counts = [max(0, end - table.end) for table in request.page_tables]
        copies = sum(self._needs_copy(table, request.cached) for table in request.page_tables)
        if sum(counts) + copies > self.allocator.free_pages:
            return False
        for table, count in zip(request.page_tables, counts, strict=True):
            self._prepare_write(table, request.cached)
            table.pages += self.allocator.allocate(count)
        return True

    def _needs_copy(self, table: PageTable, start: int) -> bool:
        """Return whether the page of the token at `start` is shared and partly filled."""
        page, slot = divmod(start, self.requirements.page_size)
        return slot > 0 and self.allocator.ref_count(table.pages[page - table.first]) > 1

    def _prepare_write(self, table: PageTable, start: int) -> None:
        """Make the page of the token at `start` writable: no other sequence or prefix uses it."""
        page, slot = divmod(start, self.requirements.page_size)
        index = page - table.first
        if self._needs_copy(table, start):
            (target,) = self.allocator.allocate(1)
            self.copies.append((table.pages[index], target))
            self.allocator.release([table.pages[index]])
            table.pages[index] = target
        elif slot:
            self.allocator.invalidate_from(table.pages[index], slot)

    def share(self, request: Request) -> list[PageTable]:
        """Return page tables for a fork, with the pages' reference counts incremented."""
        end = self.requirements.end_page(request.cached)
        shared = [
            PageTable(table.first, table.pages[: end - table.first], table.registered)
            for table in request.page_tables
        ]
        for table in shared:
            self.allocator.share(table.pages)
        return shared

    def truncate(self, request: Request, tokens: int) -> None:
        """Truncate the sequence to `tokens` cached tokens, and free the pages after them.

        If a page in the window of the next token has been freed, the whole sequence is recomputed.
        """
        tokens = min(tokens, request.cached)
        if not tokens or any(
            self.requirements.first_page(group, tokens) < table.first
            for group, table in enumerate(request.page_tables)
        ):
            self.release(request)
            request.reset_for_recompute()
            return
        for table in request.page_tables:
            end = max(0, self.requirements.end_page(tokens) - table.first)
            self.allocator.release(table.pages[end:])
            del table.pages[end:]
            table.registered = min(table.registered, tokens // self.requirements.page_size)
        request.cached = tokens

    def release(self, request: Request) -> None:
        """Free all pages of `request`. Registered ones stay in the prefix cache until evicted."""
        for table in request.page_tables:
            self.allocator.release(table.pages)
        request.page_tables = []

    # Prefix cache

    def match_prefix(self, request: Request, limit: int = sys.maxsize) -> PrefixMatch:
        """Return the longest cached prefix of at most `limit` tokens.

        It ends at a page boundary, or at the sequence's last token but one: the last token always
        runs, for its logits.
        """
        if not self.prefix_caching:
            return PrefixMatch()
        keys = self.page_hashes(request)
        full_groups = [
            group for group in self._groups if not self.requirements.groups.windows[group]
        ]
        cached = 0  # leading pages that are cached for all groups without a window
        while cached < len(keys) and all(
            self.allocator.find((keys[cached], group)) is not None for group in full_groups
        ):
            cached += 1
        page_size = self.requirements.page_size
        last = request.num_tokens - 1
        for pages in range(cached, 0, -1):
            tokens = min(pages * page_size, last)
            if tokens <= limit and self._is_cached(keys, tokens):
                break
        else:
            tokens = 0
        end = self.requirements.end_page(tokens)
        next_key = None
        if end < len(keys) and min((end + 1) * page_size, last) <= limit:
            next_key = keys[end]
        return PrefixMatch(tokens=tokens, keys=tuple(keys[:end]), next_key=next_key)

    def _is_cached(self, keys: list[bytes], tokens: int) -> bool:
        """Return whether all pages are cached that the query after `tokens` tokens sees."""
        end = self.requirements.end_page(tokens)
        return all(
            self.allocator.find((keys[page], group)) is not None
            for group in self._groups
            for page in range(self.requirements.first_page(group, tokens), end)
        )

    def adopt_prefix(self, request: Request, match: PrefixMatch) -> None:
        """Replace the request's pages by the shared pages of a prefix match."""
        self.release(request)
        request.reset_for_recompute()
        for group in self._groups:
            first = self.requirements.first_page(group, match.tokens)
            cached = [self.allocator.find((key, group)) for key in match.keys[first:]]
            pages = [page for page in cached if page is not None]
            assert len(pages) == len(cached), "match_prefix found these pages"
            self.allocator.share(pages)
            registered = match.tokens // self.requirements.page_size
            request.page_tables.append(PageTable(first, pages, registered))
        request.cached = match.tokens

    def cache_prefix(self, request: Request) -> None:
        """Register the request's full pages in the prefix cache.

        The last, partly filled page is registered too while the request has no output.
        """
        if not self.prefix_caching or not request.page_tables:
            return
        size = self.requirements.page_size
        keys = self._full_page_hashes(request, min(request.cached, request.num_tokens))
        for group, table in enumerate(request.page_tables):
            for page in range(max(table.first, table.registered), min(table.end, len(keys))):
                self.allocator.register(table.pages[page - table.first], (keys[page], group), size)
            table.registered = max(table.registered, len(keys))
        page, slots = divmod(request.num_tokens - 1, size)
        if slots and not request.output_ids and request.cached >= request.num_tokens - 1:
            key = self.page_hashes(request)[page]
            for group, table in enumerate(request.page_tables):
                self.allocator.register(table.pages[page - table.first], (key, group), slots)

    def pending_prefixes(self, requests: Iterable[Request]) -> set[bytes]:
        """Return the keys of pages that these requests are about to fill with prompt tokens."""
        if not self.prefix_caching:
            return set()
        size = self.requirements.page_size
        return {
            key
            for request in requests
            for key in self.page_hashes(request)[request.cached // size :]
        }

    def page_hashes(self, request: Request) -> list[bytes]:
        """Return the keys of all pages, a partly filled one included, without the last token."""
        tokens = request.num_tokens - 1
        keys = self._full_page_hashes(request, tokens)
        rest = tokens % self.requirements.page_size
        return [*keys, self._hash(request, keys, tokens - rest, tokens)] if rest else keys

    def _full_page_hashes(self, request: Request, tokens: int) -> list[bytes]:
        """Return the keys of the full pages of the first `tokens` tokens. Each is computed once."""
        size = self.requirements.page_size
        known = request.page_hashes
        for page in range(len(known), tokens // size):
            known.append(self._hash(request, known, page * size, (page + 1) * size))
        return known[: tokens // size]

    def _hash(self, request: Request, before: list[bytes], start: int, stop: int) -> bytes:
        """Return the key of tokens `start .. stop-1`, chained to the key of the page before."""
        context = str(request.context if self.hash_context else "").encode()
        parent = before[-1] if before else context
        ids = np.asarray(request.tokens(start, stop), np.int32)
        return hashlib.blake2b(parent + ids.tobytes(), digest_size=16).digest()


@dataclasses.dataclass(eq=False)
class SequenceHandle:
    """A sequence outside the scheduler, such as a session's, with its pages."""

    kv_manager: KVCacheManager
    request: Request

    def fork(self) -> "SequenceHandle":
        """Return a copy of the sequence that shares its pages."""
        request = self.request
        forked = Request(
            list(request.prompt_ids),
            request.params,
            request.key,
            request.max_tokens,
            context=request.context,
            cached=request.cached,
            page_tables=self.kv_manager.share(request),
            page_hashes=list(request.page_hashes),
        )
        return SequenceHandle(self.kv_manager, forked)
