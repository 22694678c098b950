"""The loop: requests in, tokens out. Holds the weights, the pool, the scheduler and the counters."""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

import jax

from jfp8kv.attention import dispatch
from jfp8kv.cache import copy
from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.config import context_length, resolve_cache
from jfp8kv.cache.pool import KVPool
from jfp8kv.core.errors import CapacityError, ConfigError, Jfp8kvError
from jfp8kv.core.platform import activation_dtype
from jfp8kv.engine import faults, matmul, postprocess, step
from jfp8kv.engine.batch import (
    BatchBuilder,
    NewTokens,
    StepOutput,
    read_new_tokens,
)
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.kv_manager import KVCacheManager, SequenceHandle
from jfp8kv.engine.options import EngineOptions
from jfp8kv.engine.programs import Output, Programs, Step, StepInputs
from jfp8kv.engine.request import CANCELLED, DEADLINE, PrefillOutput, Request, Status
from jfp8kv.engine.sampler_state import PLAIN, SamplerVariant
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill, Scheduler, SchedulerOutput
from jfp8kv.engine.speculative import decode_ahead
from jfp8kv.engine.stats import Stats, Stopwatch
from jfp8kv.engine.step import Weights
from jfp8kv.engine.structured import StructuredOutput
from jfp8kv.models.linear import on_cpu
from jfp8kv.models.params import Params
from jfp8kv.models.rope import switch_length
from jfp8kv.sampling.params import MAX_LOGPROBS, SamplingParams


@dataclasses.dataclass(frozen=True)
class Flight:
    """A part of a turn that was given to the device, and what will come of it."""

    turn: int
    plan: ScheduledDecode | ScheduledPrefill
    output: Any
    positions: tuple[range, ...] = ()  # of a prefill, by request


class Engine:
    """Run requests of one model over one pool of pages."""

    def __init__(self, params: Params, options: EngineOptions, *, weights: Weights | None = None):
        config = params.config
        cpu = jax.default_backend() == "cpu"
        self.max_model_len = context_length(config, options.max_model_len)
        halves_on_cpu = cpu and activation_dtype(params.dtype).itemsize == 2
        self.buckets = Buckets.of(
            options.max_num_seqs,
            options.max_num_batched_tokens,
            min_decode_rows=2 if halves_on_cpu else 1,
            drafts=options.prompt_lookup,
            vocab=config.vocab,
        )

        self.params = params
        page_size = options.page_size
        self.cache_config = resolve_cache(
            params,
            options.kv_dtype,
            options.kv_scales,
            page_size=page_size,
            max_tokens_per_dispatch=self.buckets.max_tokens_per_dispatch,
            longest=self.max_model_len,
        )
        self.requirements = self.cache_config.requirements
        longest = self.requirements.total_pages(self.max_model_len)
        self.num_pages = self.cache_config.num_pages(
            options.kv_cache_memory, limit=longest * self.buckets.max_requests
        )
        self.attention = dispatch.select_backend(
            options.attention, jax.eval_shape(lambda: self.cache_config.new_pool(self.num_pages))
        )
        self.cache_config = dataclasses.replace(
            self.cache_config, keys_transposed=self.attention.keys_transposed
        )
        self.pages: KVPool | None = faults.allocate_pool(
            self.cache_config, self.num_pages
        )  # None once a failed step has taken it

        self.model = step.StepModel(
            config,
            params.dtype,
            self.attention.attend,
            self.cache_config.groups,
            self.attention.write,
            matmul.beside(self.attention.name),
        )
        if weights is None:
            weights = (
                jax.tree.map(lambda w: on_cpu(w, params.dtype), params.tree) if cpu else params.tree
            )
        self.programs = Programs(self.model, weights, self.cache_config.layer_scales())

        table_pages = -(-self.max_model_len // page_size)
        self.batch_builder = BatchBuilder(
            buckets=self.buckets,
            vocab=config.vocab,
            requirements=self.requirements,
            pages=table_pages,
            num_pages=self.num_pages,
            max_model_len=self.max_model_len,
            eos_ids=params.eos_ids,
            switch_length=switch_length(config.ropes),
        )
        self.structured_output = StructuredOutput(
            params.tokenizer, config.vocab, eos_ids=self.batch_builder.eos_ids
        )
        self._kv_manager_options = {
            "prefix_caching": options.prefix_caching,
            "hash_context": any(rope.kind in ("dynamic", "longrope") for rope in config.ropes),
        }
        self.stats = Stats(
            kv_tokens_capacity=self.num_pages * page_size * table_pages // longest,
            kv_bytes_per_token=self.cache_config.bytes_per_token(self.max_model_len),
            kv_bytes_per_token_without_windows=self.cache_config.without_windows.bytes_per_token(
                self.max_model_len
            ),
            kv_bytes_capacity=self.num_pages * self.cache_config.page_bytes,
        )
        self.scheduler = self._new_scheduler()
        self.dropped: deque[SequenceHandle] = deque()
        self._flying: deque[Flight] = deque()  # dispatched and not booked, in order
        self._made: deque[NewTokens] = (
            deque()
        )  # tokens that requests got and their users were not told of
        self._turn = 0
        self._watch, self._free_since = Stopwatch(), 0.0

    def _new_scheduler(self) -> Scheduler:
        kv_manager = KVCacheManager(
            PageAllocator(self.num_pages), self.requirements, **self._kv_manager_options
        )
        return Scheduler(
            kv_manager, self.buckets, self.stats, max_requests=self.buckets.max_requests
        )

    # -- what a request must satisfy ------------------------------------------------------------------------------------

    def check(
        self, prompt_ids: list[int], params: SamplingParams, *, what: str = "prompt", more: int = 1
    ) -> None:
        """Raise `ConfigError` or `CapacityError` unless the empty engine could finish this request and make `more` tokens."""
        if not prompt_ids:
            raise ConfigError(f"{what} is empty: at least one token is needed.")
        vocab = self.params.config.vocab
        bad = next((t for t in prompt_ids if not 0 <= t < vocab), None)
        if bad is not None:
            raise ConfigError(f"{what} holds token id {bad}: ids must be from 0 to {vocab - 1}.")
        params.check_vocab(vocab)
        self.structured_output.check(params)
        self.check_length(len(prompt_ids), more, what=what)
        capacity = self.stats.kv_tokens_capacity
        needed = min(len(prompt_ids) + params.max_tokens * (more > 0), self.max_model_len)
        if (pages := self.requirements.total_pages(needed)) > self.num_pages:
            raise CapacityError(
                f"{what} of {len(prompt_ids)} tokens with max_tokens={params.max_tokens} needs {needed} tokens of cache, and "
                f"the pool holds {capacity}: give kv_cache_memory of at least "
                f"{pages * self.cache_config.page_bytes} bytes, or a smaller max_tokens."
            )

    def check_length(self, tokens: int, more: int, *, what: str = "prompt") -> None:
        """Raise `CapacityError` if a prompt of `tokens` leaves no room for `more` within `max_model_len`."""
        if tokens + more > self.max_model_len:
            limit = f"max_model_len={self.max_model_len}"
            raise CapacityError(
                f"{what} has {tokens} tokens: {limit} leaves room for {self.max_model_len - more} at most."
            )

    # -- running --------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request that `check` has passed; what would not fit `max_model_len` is not generated."""
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.scheduler.add(request)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Take requests out, whatever their state, and free their pages at once."""
        for request in requests:
            if request.finish_reason is None:
                postprocess.finish(request, CANCELLED, self.scheduler)
        self.count_used()

    def end_late(self, now: float) -> None:
        """End requests whose deadline has passed, with what they have."""
        for request in [
            r for r in (*self.scheduler.waiting, *self.scheduler.running) if r.deadline <= now
        ]:
            postprocess.finish(request, DEADLINE, self.scheduler)
        self.count_used()

    def step(self) -> None:
        """A turn for whatever is queued, whoever queued it.

        Waits for the last turn's tokens, books of them what the next plan needs, and dispatches that; while it runs, texts are
        made of the tokens, and their users told. The first in the queue is told, and dropped, if there will be no room for it.
        """
        self.free_dropped()
        with self._watch:
            self._collect()
            try:
                scheduled = self.scheduler.schedule()
                if scheduled is None:
                    self._collect(everything=True)
                else:
                    self._dispatch(scheduled)
            except CapacityError as error:
                first = self.scheduler.waiting[0]
                self._tell()  # which may show that it has ended
                if first.finish_reason is None:
                    first.error = error
                    self.cancel([first])
            finally:
                self._tell()

    def settle(self) -> None:
        """Wait for whatever is on the device, and book all of it."""
        with self._watch:
            self._collect(everything=True)
            self._tell()

    def abandon(self, requests: Iterable[Request], error: Jfp8kvError) -> None:
        """After a failed step: these requests end with `error`, and nothing is cached any more. The pool may be gone too."""
        for request in requests:
            request.status, request.page_tables = Status.FINISHED, []
            request.error, request.finish_reason = error, CANCELLED
        flying, self._flying = self._flying, deque()
        self._made.clear()
        for flight in flying:
            with contextlib.suppress(Exception):
                jax.block_until_ready(flight.output)  # what still runs holds memory
        self.scheduler = self._new_scheduler()
        try:
            jax.block_until_ready(self.pages)
        except Exception:
            self.pages = None
        self.count_used()

    def ready(self) -> None:
        """Have a pool. Raises `DeviceMemoryError`."""
        if self.pages is None:
            self.pages = faults.allocate_pool(self.cache_config, self.num_pages)

    def count_used(self) -> None:
        """Say in `stats` what is held now."""
        self.stats.kv_tokens_used = sum(r.cached for r in self.scheduler.running)
        self.stats.kv_bytes_used = (
            self.scheduler.kv_manager.allocator.used_pages * self.cache_config.page_bytes
        )

    # -- the device -----------------------------------------------------------------------------------------------------

    def _dispatch(self, turn: SchedulerOutput) -> None:
        """Hand a turn to the device, which runs it while the host goes on."""
        if not self._flying:
            self._free_since = self._watch.now()
        self._turn += 1
        if turn.decode is not None:
            held = any(request.params.constraint for request in turn.decode.requests)
            output = (self.decode_structured if held else self.decode)(turn.decode)
            self._flying.append(Flight(self._turn, turn.decode, output))
            self.stats.decode_steps += turn.decode.steps
        if turn.prefill is not None:
            output = self.prefill(turn.prefill)
            chunks = list(zip(turn.prefill.requests, turn.prefill.chunks, strict=True))
            positions = tuple(range(r.cached, r.cached + chunk) for r, chunk in chunks)
            self._flying.append(Flight(self._turn, turn.prefill, output, positions))
            self.stats.prefill_steps += 1
            for request, chunk in chunks:
                request.cached += chunk
                self.scheduler.kv_manager.cache_prefix(request)
                if request.prefill_only and not request.prefilling:
                    self.scheduler.finish(request)  # its outputs are stored once they are there
        self.count_used()

    def prefill(self, plan: ScheduledPrefill) -> Any:
        """Start a prefill, and return its output on the device."""
        match plan.output:
            case PrefillOutput.NONE:
                return self._launch(step.prefill, self.batch_builder.prefill(plan))
            case PrefillOutput.LOGITS:
                return self._launch(step.logits, self.batch_builder.prefill(plan))
            case PrefillOutput.LOGPROBS:
                top = min(MAX_LOGPROBS, self.params.config.vocab)
                return self._launch(step.logprobs, self.batch_builder.logprobs(plan), top=top)

    def decode(self, plan: ScheduledDecode, least: SamplerVariant = PLAIN) -> StepOutput:
        """Start a decode, by the program `least` at least."""
        batch, variant = self.batch_builder.decode(plan, least)
        static = {
            "most_steps": self.buckets.decode_steps,
            "top": min(variant.top, self.params.config.vocab),
        }
        if drafts := self.buckets.drafts:
            return self._launch(decode_ahead, batch, variant=variant.name, drafts=drafts, **static)
        return self._launch(step.decode, batch, variant=variant.name, **static)

    def decode_structured(self, plan: ScheduledDecode, least: SamplerVariant = PLAIN) -> StepOutput:
        """The same for one token each. While the device runs the model, the host finds out what grammars allow."""
        logits = self._launch(step.logits, self.batch_builder.last_tokens(plan))
        batch, variant = self.batch_builder.decode(plan, least)
        began = time.perf_counter()
        bitmask = self.structured_output.allowed(plan.requests, rows=len(batch.position))
        self.stats.grammar_s += time.perf_counter() - began
        batch = dataclasses.replace(batch, token_bitmask=bitmask)
        top = min(variant.top, self.params.config.vocab)
        output = self.programs.compute(step.sample, logits, batch, variant=variant.name, top=top)
        self.stats.compilations = len(self.programs.compiled)
        return output

    def _launch(
        self, function: Step[Output], batch: StepInputs, *, scales: Any = None, **static: Hashable
    ) -> Output:
        """Start a step on the pool, in place, after the copies of pages that it waits for."""
        self._copy_pages()
        output, self.pages = self.programs.call(
            function, batch, self.pages, scales=scales, **static
        )
        self.stats.compilations = len(self.programs.compiled)
        return output

    def _copy_pages(self) -> None:
        """Hand the copies that were noted to the device. Whatever became of their pages since, on the host: nothing has written
        to these in between, as every step comes after all that were noted before it."""
        kv_manager = self.scheduler.kv_manager
        for copies in copy.batched(kv_manager.copies):
            _, self.pages = self.programs.call(step.copy, copies, self.pages)
        kv_manager.copies.clear()

    def run(
        self, function: Step[Output], batch: StepInputs, *, scales: Any = None, **static: Hashable
    ) -> Output:
        """Run a step on the pool, in place, and wait until it is done. `scales`: see `Programs.call`."""
        output = self._launch(function, batch, scales=scales, **static)
        return jax.block_until_ready((output, self.pages))[0]

    def _collect(self, *, everything: bool = False) -> None:
        """Wait for the tokens of the last turn, and book them. Its prompts may run on: no plan depends on how they end.

        That they do end is seen a turn later, so the host is never more than a turn ahead.
        """
        while self._flying:
            flight = self._flying[0]
            if (
                isinstance(flight.plan, ScheduledPrefill)
                and flight.turn == self._turn
                and not everything
            ):
                return
            if isinstance(flight.plan, ScheduledPrefill):
                jax.block_until_ready(flight.output)
                self.stats.prefill_s += self._seconds()
                if flight.plan.output is not PrefillOutput.NONE:
                    postprocess.store_prompt_outputs(
                        flight.output, flight.plan, flight.positions, self.scheduler
                    )
            elif any(r.status is Status.RUNNING for r in flight.plan.requests):
                made = read_new_tokens(
                    flight.output, flight.plan.requests, self.params.config.vocab
                )
                self.stats.decode_s += self._seconds()
                self._made += [
                    m
                    for m in made
                    if postprocess.commit_tokens(
                        m, self.scheduler, self.batch_builder.switch_length
                    )
                ]
                postprocess.count_drafts(flight.output, self.stats)
            self._flying.popleft()

    def _seconds(self) -> float:
        """Since the device was free."""
        before, self._free_since = self._free_since, self._watch.now()
        return self._free_since - before

    def _tell(self) -> None:
        """Make texts of the tokens that were booked. A request that a stop string ends may have more on the device: dropped
        when it comes."""
        while self._made:
            if self._made[0].request.finish_reason is None:
                postprocess.emit_output(self._made[0], self.scheduler, self.stats)
            self._made.popleft()
        self.count_used()

    def free_dropped(self) -> None:
        """Free the pages of sessions that are gone. When they go they are only noted: it may be in the middle of anything."""
        while self.dropped:
            holding = self.dropped.popleft()
            holding.kv_manager.release(holding.request)
            self.count_used()
