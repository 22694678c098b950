"""The loop: requests in, tokens out. Holds the weights, the pool, the scheduler and the counters."""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jfp8kv.attention import dispatch
from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.core.errors import CapacityError, ConfigError
from jfp8kv.core.platform import activation_dtype
from jfp8kv.engine import copies, products, step
from jfp8kv.engine.batch import Batch, Batcher, Made, read
from jfp8kv.engine.buckets import DECODE_STEPS, Buckets, default_token_budget
from jfp8kv.engine.kv import context_length, positive, setup
from jfp8kv.engine.metrics import Stats
from jfp8kv.engine.paging import Paging
from jfp8kv.engine.programs import Programs
from jfp8kv.engine.request import CANCELLED, Request, Status
from jfp8kv.engine.scheduler import Decode, Plan, Prefill, Scheduler
from jfp8kv.models.linear import on_cpu
from jfp8kv.models.params import Params
from jfp8kv.models.rope import switch_length
from jfp8kv.sampling.params import SamplingParams


@dataclasses.dataclass(eq=False)
class Holding:
    """The text of a session, and whose pages it holds."""

    paging: Paging
    request: Request

    def fork(self) -> "Holding":
        """The same text, its pages held once more."""
        text = self.request
        twin = Request(list(text.prompt_ids), text.params, text.key, text.max_tokens, context=text.context, cached=text.cached)
        twin.held, twin.keys = self.paging.share(text), list(text.keys)
        return Holding(self.paging, twin)


class Engine:
    """Runs requests of one model over one pool of pages. See `jfp8kv.LLM` for the arguments."""

    def __init__(
        self,
        params: Params,
        *,
        kv_dtype: Any = "auto",
        kv_scales: Any = "auto",
        kv_cache_memory: Any = None,
        max_model_len: Any = None,
        max_num_seqs: Any = 64,
        max_num_batched_tokens: Any = None,
        page_size: Any = 64,
        attention: Any = None,
        prefix_caching: bool = True,
    ):
        config = params.config
        cpu = jax.default_backend() == "cpu"
        self.max_model_len = context_length(config, max_model_len)
        max_num_seqs = positive("max_num_seqs", max_num_seqs, 64)
        budget = positive("max_num_batched_tokens", max_num_batched_tokens, default_token_budget())
        halves_on_cpu = cpu and activation_dtype(params.dtype).itemsize == 2
        self.buckets = Buckets(max_num_seqs, budget, DECODE_STEPS, fewest=2 if halves_on_cpu else 1)

        self.params = params
        sizes = {"page_size": page_size, "span": self.buckets.span, "longest": self.max_model_len}
        self.kv = setup(params, kv_dtype, kv_scales, **sizes)
        self.needs = self.kv.needs
        longest = self.needs.total(self.max_model_len)
        self.num_pages = self.kv.num_pages(kv_cache_memory, most=longest * max_num_seqs)
        self.attention = dispatch.choose(attention, jax.eval_shape(lambda: self.kv.pool(self.num_pages)))
        self.kv = dataclasses.replace(self.kv, keys_transposed=self.attention.keys_transposed)
        self.pages = self.kv.pool(self.num_pages)

        self.model = step.Model(
            config,
            params.dtype,
            self.attention.attend,
            self.kv.groups,
            self.attention.write,
            products.beside(self.attention.name),
        )
        weights = jax.tree.map(lambda w: on_cpu(w, params.dtype), params.tree) if cpu else params.tree
        self.programs = Programs(self.model, weights, self.kv.layer_scales())

        table_pages = -(-self.max_model_len // page_size)
        self.batcher = Batcher(
            buckets=self.buckets,
            vocab=config.vocab,
            needs=self.needs,
            pages=table_pages,
            num_pages=self.num_pages,
            eos_ids=params.eos_ids,
            switch_length=switch_length(config.ropes),
        )
        self._paging = {
            "reuse": prefix_caching,
            "by_context": any(rope.kind in ("dynamic", "longrope") for rope in config.ropes),
        }
        self.stats = Stats(
            kv_tokens_capacity=self.num_pages * page_size * table_pages // longest,
            kv_bytes_per_token=self.kv.bytes_per_token(self.max_model_len),
            kv_bytes_per_token_without_windows=self.kv.without_windows.bytes_per_token(self.max_model_len),
            kv_bytes_capacity=self.num_pages * self.kv.page_bytes,
        )
        self.scheduler = self._new_scheduler()
        self.dropped: deque[Holding] = deque()

    def _new_scheduler(self) -> Scheduler:
        paging = Paging(PageAllocator(self.num_pages), self.needs, **self._paging)
        return Scheduler(paging, self.buckets, self.stats, max_requests=self.buckets.max_requests)

    # -- what a request must satisfy ------------------------------------------------------------------------------------

    def check(self, prompt_ids: list[int], params: SamplingParams, *, what: str = "prompt", more: int = 1) -> None:
        """Raise `ConfigError` or `CapacityError` unless the empty engine could finish this request and make `more` tokens."""
        if not prompt_ids:
            raise ConfigError(f"{what} is empty: at least one token is needed.")
        vocab = self.params.config.vocab
        bad = next((t for t in prompt_ids if not 0 <= t < vocab), None)
        if bad is not None:
            raise ConfigError(f"{what} holds token id {bad}: ids must be from 0 to {vocab - 1}.")
        params.check_vocab(vocab)
        self.check_length(len(prompt_ids), more, what=what)
        capacity = self.stats.kv_tokens_capacity
        needed = min(len(prompt_ids) + params.max_tokens * (more > 0), self.max_model_len)
        if (pages := self.needs.total(needed)) > self.num_pages:
            raise CapacityError(
                f"{what} of {len(prompt_ids)} tokens with max_tokens={params.max_tokens} needs {needed} tokens of cache, and "
                f"the pool holds {capacity}: give kv_cache_memory of at least "
                f"{pages * self.kv.page_bytes} bytes, or a smaller max_tokens."
            )

    def check_length(self, tokens: int, more: int, *, what: str = "prompt") -> None:
        """Raise `CapacityError` if a prompt of `tokens` leaves no room for `more` within `max_model_len`."""
        if tokens + more > self.max_model_len:
            limit = f"max_model_len={self.max_model_len}"
            raise CapacityError(f"{what} has {tokens} tokens: {limit} leaves room for {self.max_model_len - more} at most.")

    # -- running --------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request that `check` has passed; what would not fit `max_model_len` is not generated."""
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.scheduler.add(request)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Take requests out, whatever their state, and free their pages at once."""
        for request in requests:
            if request.finish_reason is None:
                self._finish(request, CANCELLED)
        self._count_used()

    def step(self) -> None:
        """One dispatch for whatever is queued, whoever queued it."""
        self.free_dropped()
        plan = self.scheduler.plan()
        if plan is None:
            return
        began = time.perf_counter()
        made = self._dispatch(plan)
        seconds = time.perf_counter() - began
        if isinstance(plan, Prefill):
            self.stats.prefill_s += seconds
            self.stats.prefill_steps += 1
            for request, chunk in zip(plan.requests, plan.chunks, strict=True):
                request.cached += chunk
                self.scheduler.paging.keep(request)
        else:
            self.stats.decode_s += seconds
            self.stats.decode_steps += plan.steps
            for request, new in zip(plan.requests, made, strict=True):
                self._advance(request, new)
        self._count_used()

    def _count_used(self) -> None:
        self.stats.kv_tokens_used = sum(r.cached for r in self.scheduler.running)
        self.stats.kv_bytes_used = self.scheduler.paging.allocator.used_pages * self.kv.page_bytes

    def _dispatch(self, plan: Plan) -> list[Made]:
        """Run `plan` on the device; what each request got, nothing for a prefill."""
        batch, vocab = self.batcher.build(plan), self.params.config.vocab
        if isinstance(plan, Prefill):
            self._call(step.prefill, batch)
            return []
        top = step.top_width([r.params.logprobs for r in plan.requests])
        return read(self._call(step.decode, batch, most_steps=self.buckets.decode_steps, top=top), plan.requests, vocab)

    def _call(self, function: Callable, batch: Batch | copies.Copies, **static: Any) -> Any:
        """Run a step on the pool, in place, after the copies of pages that it waits for."""
        try:
            self._copy_pages()
            out, self.pages = self.programs.call(function, batch, self.pages, **static)
            jax.block_until_ready(self.pages)
        except BaseException:
            self._abandon()
            raise
        self.stats.compilations = len(self.programs.built)
        return out

    def _copy_pages(self) -> None:
        paging = self.scheduler.paging
        for some in copies.dispatches(paging.copies):
            _, self.pages = self.programs.call(copies.copy, some, self.pages)
        paging.copies.clear()

    def _abandon(self) -> None:
        """After a failed step the donated pool may be gone: drop every request and start with an empty one."""
        for request in (*self.scheduler.waiting, *self.scheduler.running):
            request.status, request.held, request.finish_reason = Status.FINISHED, [], CANCELLED
        self.scheduler = self._new_scheduler()
        self.pages = self.kv.pool(self.num_pages)
        self._count_used()

    # -- results --------------------------------------------------------------------------------------------------------

    def _advance(self, request: Request, made: Made) -> None:
        """Book the tokens that one request got."""
        request.cached += len(made.token_ids)
        now = time.perf_counter()
        if request.first_token is None:
            request.first_token = now
        self.stats.generated_tokens += len(made.token_ids)
        request.output_ids += made.token_ids
        request.output_logprobs += made.logprobs
        request.top_logprobs += made.top
        self.scheduler.paging.keep(request)
        if reason := self._finish_reason(request, made.token_ids):
            self._finish(request, reason)
            request.finished = now
        elif (limit := self.batcher.switch_length) is not None and request.context <= limit < request.num_tokens:
            self.scheduler.paging.release(request)
            request.begin_again(request.num_tokens)

    def _finish_reason(self, request: Request, new_ids: list[int]) -> str | None:
        ends = self.batcher.end_ids(request)
        ended = bool(new_ids) and new_ids[-1] in ends
        text = request.detokenizer
        if text is not None:
            request.text += text.push(new_ids[:-1] if ended else new_ids)
            if text.stopped is not None:
                self._cut(request, text.tokens_kept)
                request.stop_reason = text.stopped
                return "stop"
        if ended:
            request.stop_reason = new_ids[-1]
            return "stop"
        return "length" if len(request.output_ids) >= request.max_tokens else None

    def _cut(self, request: Request, tokens: int) -> None:
        """Drop what was generated past a stop string."""
        for made in (request.output_ids, request.output_logprobs, request.top_logprobs):
            del made[tokens:]

    def _finish(self, request: Request, reason: str) -> None:
        if request.detokenizer is not None and request.detokenizer.stopped is None:
            request.text += request.detokenizer.finish()
        request.finish_reason = reason
        self.scheduler.finish(request)

    # -- logits ---------------------------------------------------------------------------------------------------------

    def logits(self, token_ids: list[int]) -> Iterator[np.ndarray]:
        """float32 `[chunk, vocab]` after each token, chunk by chunk, through the cache as in generation."""
        for chunk, logits in self.chunks(token_ids, step.score):
            yield np.asarray(logits[0, : len(chunk)])

    def chunks(self, token_ids: list[int], function: Callable, **static: Any) -> Iterator[tuple[range, Any]]:
        """Run a text through `function` (a step such as `step.score`) chunk by chunk: the positions, and what it gave.

        That is on the device, and padded: `[requests, tokens, ...]`, of which the first row's first tokens are meant.
        """
        request = Request(token_ids, SamplingParams(max_tokens=1), np.zeros(2, np.uint32), max_tokens=1)
        paging = self.scheduler.paging  # a failed step replaces the engine's
        pages, free = self.needs.total(len(token_ids)), paging.allocator.free_pages
        if pages > free:
            raise CapacityError(
                f"{len(token_ids)} tokens need {pages} pages of cache and {free} are free while other requests run: finish or "
                "close them first, or give a larger kv_cache_memory."
            )
        try:
            for _, (positions,), out in self._chunks([request], function, self.buckets.chunk, **static):
                yield positions, out
        finally:
            paging.release(request)

    def _chunks(
        self, requests: list[Request], function: Callable, width: Callable[[int], int], **static: Any
    ) -> Iterator[tuple[list[Request], list[range], Any]]:
        """Run what is not cached of these texts, several at a time: whose, which positions of each, and what came of it.

        `width`: of the chunks in a dispatch, for the most tokens that one of the texts has left.
        """
        while left := [r for r in requests if r.uncached]:
            wide = width(max(r.uncached for r in left))
            chosen = left[: self.buckets.prefill_requests(wide)]
            chunks = [min(r.uncached, wide) for r in chosen]
            for request, chunk in zip(chosen, chunks, strict=True):
                self.scheduler.make_room(request, request.cached + chunk)
            batch = self.batcher.build(Prefill(chosen, chunks, wide))
            positions = [range(r.cached, r.cached + chunk) for r, chunk in zip(chosen, chunks, strict=True)]
            yield chosen, positions, self._call(function, batch, **static)  # not kept here: it may be large
            for request, chunk in zip(chosen, chunks, strict=True):
                request.cached += chunk

    # -- sessions -------------------------------------------------------------------------------------------------------

    def catch_up(
        self, holdings: list[Holding], function: Callable, *, wanted: int = sys.maxsize
    ) -> Iterator[tuple[list[Request], list[range], Any]]:
        """Run through `function` what of sessions' texts is not in the cache, as `_chunks` does, and keep it there.

        The tokens from position `wanted` on, and the last of each text, are run even where others have them in the cache.
        """
        self.free_dropped()
        for holding in holdings:
            self._take_up(holding, wanted)
        yield from self._chunks([h.request for h in holdings], function, self.buckets.extension)
        for holding in holdings:
            holding.paging.keep(holding.request)
        self._count_used()

    def _take_up(self, holding: Holding, wanted: int) -> None:
        """What a session's text has in the cache can be used or is given back; what others have of it is taken over."""
        request, paging = holding.request, self.scheduler.paging
        if holding.paging is not paging:  # a failed step took all pages
            request.held, holding.paging = [], paging
            request.begin_again()
        limit = self.batcher.switch_length
        if limit is not None and (request.context <= limit) != (request.num_tokens <= limit):
            paging.release(request)
            request.begin_again(request.num_tokens)
        if request.uncached > 1 and (found := paging.find(request, wanted)) > request.cached:
            paging.take_over(request, found)

    def free_dropped(self) -> None:
        """Free the pages of sessions that are gone. When they go they are only noted: it may be in the middle of anything."""
        while self.dropped:
            holding = self.dropped.popleft()
            holding.paging.release(holding.request)
            self._count_used()

    def warmup(self) -> None:
        """Compile every program that plain requests can need.

        Requests with penalties, logit_bias, min_tokens, logprobs or more than 8 end tokens each add a decode program once.
        """
        for width in self.buckets.chunks:
            for rows in self.buckets.request_counts(self.buckets.prefill_requests(width)):
                self._rehearse(lambda requests, w=width: Prefill(requests, [1] * len(requests), w), rows)
        for rows in self.buckets.request_counts(self.buckets.max_requests):
            self._rehearse(lambda requests: Decode(requests, 1), rows)
        self._call(copies.copy, copies.Copies.of([]))

    def _rehearse(self, plan: Callable[[list[Request]], Plan], rows: int) -> None:
        """Run a plan for `rows` requests that own no page: nothing is written, nothing is booked."""
        params = SamplingParams(max_tokens=1)
        requests = [
            Request([0], params, np.zeros(2, np.uint32), max_tokens=1) for _ in range(min(rows, self.buckets.max_requests))
        ]
        self._dispatch(plan(requests))
