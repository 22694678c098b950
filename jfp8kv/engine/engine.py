"""The engine: runs requests. It owns the weights, the page pool and the scheduler.

A step of the engine waits for the tokens of the previous step, commits them, schedules the next
step and dispatches it. While the device runs it, the host emits the output of the committed tokens.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import jax

from jfp8kv.attention.dispatch import select_backend
from jfp8kv.attention.matmul import select_matmul
from jfp8kv.cache.allocator import PageAllocator
from jfp8kv.cache.config import context_length, resolve_cache
from jfp8kv.cache.copy import copy_batches
from jfp8kv.cache.pool import KVPool
from jfp8kv.core.errors import CapacityError, Jfp8kvError
from jfp8kv.core.log import logger
from jfp8kv.core.platform import activation_dtype
from jfp8kv.engine import step
from jfp8kv.engine.batch import BatchBuilder, StepOutput
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.kv_manager import KVCacheManager, SequenceHandle
from jfp8kv.engine.memory import default_cache_bytes
from jfp8kv.engine.options import EngineOptions
from jfp8kv.engine.postprocess import StepResults, finish
from jfp8kv.engine.programs import Output, Programs, Step, StepInputs
from jfp8kv.engine.request import CANCELLED, DEADLINE, PrefillOutput, Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill, Scheduler, SchedulerOutput
from jfp8kv.engine.speculative import decode_speculative
from jfp8kv.engine.stats import Stats
from jfp8kv.engine.step import PrefillResult
from jfp8kv.models.linear import backend_weights
from jfp8kv.models.params import Params
from jfp8kv.models.rope import switch_length
from jfp8kv.sampling.params import MAX_LOGPROBS, SamplingParams
from jfp8kv.sampling.state import PLAIN, SamplerVariant
from jfp8kv.sampling.structured import StructuredOutput
from jfp8kv.text.prompts import check_token_ids


class Engine:
    """Runs requests of one model over one pool of pages. Not thread-safe: see engine/driver.py.

    Args:
      params: the model.
      options: see `EngineOptions`.
      weights: the device weights of another engine with the same `params`, to share them.

    Attributes:
      dropped: handles of sequences to free before the next step. Appending is safe at any time.
    """

    def __init__(
        self, params: Params, options: EngineOptions, *, weights: step.Weights | None = None
    ):
        config = params.config
        on_host = jax.default_backend() == "cpu"
        slow_single_row = on_host and activation_dtype(params.dtype).itemsize == 2
        self.params = params
        self.options = options
        self.max_model_len = context_length(config, options.max_model_len)
        self.buckets = Buckets.of(
            options.max_num_seqs,
            options.max_num_batched_tokens,
            min_decode_rows=2 if slow_single_row else 1,
            drafts=options.prompt_lookup,
            vocab=config.vocab,
        )
        cache_config = resolve_cache(
            params,
            options.kv_dtype,
            options.kv_scales,
            page_size=options.page_size,
            max_tokens_per_dispatch=self.buckets.max_tokens_per_dispatch,
            max_model_len=self.max_model_len,
        )
        self.requirements = cache_config.requirements
        self._pages_per_sequence = self.requirements.total_pages(self.max_model_len)
        self.attention = select_backend(
            options.attention,
            jax.eval_shape(lambda: cache_config.new_pool(self._pages_per_sequence)),
        )
        self.cache_config = dataclasses.replace(
            cache_config, keys_transposed=self.attention.keys_transposed
        )
        self.model = step.StepModel(
            config=config,
            dtype=params.dtype,
            attention=self.attention.attend,
            groups=self.cache_config.groups,
            write=self.attention.write,
            matmul=select_matmul(self.attention.name),
        )
        if weights is None:
            weights = backend_weights(params.tree, params.dtype)
        self.programs = Programs(self.model, weights, self.cache_config.layer_scales())
        self.structured_output = StructuredOutput(
            params.tokenizer, config.vocab, eos_ids=params.eos_ids
        )
        self.num_pages = self._pool_size()
        self._pages: KVPool | None = self.cache_config.allocate(self.num_pages)
        self.batch_builder = self._new_batch_builder(self.num_pages)
        self.stats = self._new_stats()
        self.scheduler = self._new_scheduler()
        self.dropped: deque[SequenceHandle] = deque()
        self.results = StepResults(
            self.stats, vocab=config.vocab, switch_length=self.batch_builder.switch_length
        )
        logger.info(
            "KV cache: %d pages (%.1f MiB, %s), %d tokens at max_model_len=%d",
            self.num_pages,
            self.stats.kv_bytes_capacity / 2**20,
            self.cache_config.name,
            self.stats.kv_tokens_capacity,
            self.max_model_len,
        )

    def _pool_size(self) -> int:
        """Return the number of pages: `kv_cache_memory`, or what the largest step leaves free."""
        max_pages = self._pages_per_sequence * self.buckets.max_requests
        budget = self.options.kv_cache_memory
        if budget is None:
            budget = default_cache_bytes(
                self.programs,
                self._new_batch_builder(self._pages_per_sequence),
                jax.eval_shape(lambda: self.cache_config.new_pool(self._pages_per_sequence)),
                limit=max_pages * self.cache_config.page_bytes,
            )
        return self.cache_config.num_pages(budget, limit=max_pages)

    def _new_batch_builder(self, num_pages: int) -> BatchBuilder:
        return BatchBuilder(
            buckets=self.buckets,
            vocab=self.params.config.vocab,
            requirements=self.requirements,
            page_table_length=self.requirements.end_page(self.max_model_len),
            num_pages=num_pages,
            max_model_len=self.max_model_len,
            eos_ids=self.params.eos_ids,
            structured_output=self.structured_output,
            switch_length=switch_length(self.params.config.ropes),
        )

    def _new_stats(self) -> Stats:
        cache = self.cache_config
        length = self.max_model_len
        tokens = self.num_pages * self.requirements.end_page(length) * cache.page_size
        return Stats(
            kv_tokens_capacity=tokens // self._pages_per_sequence,
            kv_bytes_per_token=cache.bytes_per_token(length),
            kv_bytes_per_token_without_windows=cache.without_windows.bytes_per_token(length),
            kv_bytes_capacity=self.num_pages * cache.page_bytes,
        )

    def _new_scheduler(self) -> Scheduler:
        ropes = self.params.config.ropes
        kv_manager = KVCacheManager(
            PageAllocator(self.num_pages),
            self.requirements,
            prefix_caching=self.options.prefix_caching,
            hash_context=any(rope.kind in ("dynamic", "longrope") for rope in ropes),
        )
        return Scheduler(
            kv_manager, self.buckets, self.stats, max_requests=self.buckets.max_requests
        )

    # Validation

    def check(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        what: str = "prompt",
        new_tokens: int = 1,
    ) -> None:
        """Raise unless the empty engine can finish this request.

        Args:
          prompt_ids: token ids of the prompt.
          params: sampling parameters.
          what: the name of the prompt in error messages.
          new_tokens: the output tokens that `max_model_len` must have room for; 0 if nothing is
            generated.

        Raises:
          ConfigError: an empty prompt, or a token id outside the vocabulary.
          CapacityError: a request that exceeds `max_model_len` or the KV cache.
        """
        vocab = self.params.config.vocab
        check_token_ids(prompt_ids, vocab, self.params.tokenizer, what=what)
        params.check_vocab(vocab)
        self.structured_output.check(params)
        self.check_length(len(prompt_ids), new_tokens, what=what)
        max_new_tokens = params.max_tokens if new_tokens else 0
        tokens = min(len(prompt_ids) + max_new_tokens, self.max_model_len)
        pages = self.requirements.total_pages(tokens)
        if pages > self.num_pages:
            raise CapacityError(
                f"{what} of {len(prompt_ids)} tokens with max_tokens={params.max_tokens} needs "
                f"{tokens} tokens of KV cache, and its capacity is "
                f"{self.stats.kv_tokens_capacity}: give kv_cache_memory of at least "
                f"{pages * self.cache_config.page_bytes} bytes, or a smaller max_tokens."
            )

    def check_length(self, tokens: int, new_tokens: int, *, what: str = "prompt") -> None:
        """Raise `CapacityError` if `max_model_len` has no room for `new_tokens` after a prompt."""
        if tokens + new_tokens > self.max_model_len:
            raise CapacityError(
                f"{what} has {tokens} tokens: max_model_len={self.max_model_len} leaves room for "
                f"{self.max_model_len - new_tokens} at most."
            )

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request that has passed `check`. Its output is limited by `max_model_len`."""
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.scheduler.add(request)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Finish requests in any state and free their pages."""
        for request in requests:
            if request.finish_reason is None:
                finish(request, CANCELLED, self.scheduler)
        self.update_usage()

    def expire_deadlines(self, now: float) -> None:
        """Finish requests whose deadline has passed, with the output they have."""
        unfinished = [*self.scheduler.waiting, *self.scheduler.running]
        for request in unfinished:
            if request.deadline <= now:
                finish(request, DEADLINE, self.scheduler)
        self.update_usage()

    def step(self) -> None:
        """Commit the tokens of the last step, dispatch the next one, and emit output meanwhile.

        If the first waiting request can never get its pages, it ends with an error.
        """
        self.free_dropped()
        with self.results.stopwatch:
            self.results.commit(self.scheduler)
            try:
                scheduled = self.scheduler.schedule()
                if scheduled is None:
                    self.results.commit(self.scheduler, wait_for_prefill=True)
                else:
                    self._dispatch(scheduled)
            except CapacityError as error:
                first = self.scheduler.waiting[0]
                self.results.emit(self.scheduler)  # a stop string may finish the request
                if first.finish_reason is None:
                    first.error = error
                    self.cancel([first])
            finally:
                self.results.emit(self.scheduler)
                self.update_usage()

    def settle(self) -> None:
        """Wait for all steps in flight, commit their tokens and emit their output."""
        with self.results.stopwatch:
            self.results.commit(self.scheduler, wait_for_prefill=True)
            self.results.emit(self.scheduler)
            self.update_usage()

    def abandon(self, requests: Iterable[Request], error: Jfp8kvError) -> None:
        """Reset the cache after a failed step, and end `requests` with `error`."""
        for request in requests:
            request.abort(error)
        self.results.discard()
        self.scheduler = self._new_scheduler()
        try:
            jax.block_until_ready(self._pages)
        except Exception:  # noqa: BLE001 (any error of the step that wrote the pool)
            self._pages = None
        self.update_usage()

    @property
    def pages(self) -> KVPool:
        """The page pool. A failed step may lose it, and `ensure_pool` allocates another."""
        assert self._pages is not None, "`ensure_pool` was called after the failed step"
        return self._pages

    @pages.setter
    def pages(self, pages: KVPool) -> None:
        self._pages = pages

    def ensure_pool(self) -> None:
        """Allocate a pool if a failed step lost it. Raises `DeviceMemoryError`."""
        if self._pages is None:
            self._pages = self.cache_config.allocate(self.num_pages)

    def free_dropped(self) -> None:
        """Free the pages of dropped sequences."""
        while self.dropped:
            handle = self.dropped.popleft()
            handle.kv_manager.release(handle.request)
            self.update_usage()

    def update_usage(self) -> None:
        """Update `stats` with the pages and tokens in use."""
        self.stats.kv_tokens_used = sum(request.cached for request in self.scheduler.running)
        used_pages = self.scheduler.kv_manager.allocator.used_pages
        self.stats.kv_bytes_used = used_pages * self.cache_config.page_bytes

    # Dispatch

    def _dispatch(self, scheduled: SchedulerOutput) -> None:
        """Start a scheduler step on the device."""
        self.results.start_step()
        if scheduled.decode is not None:
            structured = any(request.params.constraint for request in scheduled.decode.requests)
            decode = self.decode_structured if structured else self.decode
            output = decode(scheduled.decode)
            self.results.add(scheduled.decode, output)
            self.stats.decode_steps += scheduled.decode.steps
        if scheduled.prefill is not None:
            prefill_output = self.prefill(scheduled.prefill)
            chunks = list(zip(scheduled.prefill.requests, scheduled.prefill.chunks, strict=True))
            positions = tuple(range(r.cached, r.cached + chunk) for r, chunk in chunks)
            self.results.add(scheduled.prefill, prefill_output, positions)
            self.stats.prefill_steps += 1
            for request, chunk in chunks:
                request.cached += chunk
                self.scheduler.kv_manager.cache_prefix(request)
                if request.prefill_only and not request.prefilling:
                    self.scheduler.finish(request)  # its outputs are stored later, by `commit`
        self.update_usage()

    def prefill(self, plan: ScheduledPrefill) -> PrefillResult:
        """Start a prefill and return its output, which stays on the device."""
        match plan.output:
            case PrefillOutput.NONE:
                return self._launch(step.prefill, self.batch_builder.prefill(plan))
            case PrefillOutput.LOGITS:
                return self._launch(step.logits, self.batch_builder.prefill(plan))
            case PrefillOutput.LOGPROBS:
                top = min(MAX_LOGPROBS, self.params.config.vocab)
                return self._launch(step.logprobs, self.batch_builder.logprobs(plan), top=top)

    def decode(self, plan: ScheduledDecode, min_variant: SamplerVariant = PLAIN) -> StepOutput:
        """Start a decode and return its output, which stays on the device.

        Args:
          plan: the requests and the number of steps.
          min_variant: the sampler serves this variant too. Warm-up compiles variants with it.
        """
        batch, variant = self.batch_builder.decode(plan, min_variant)
        top = min(variant.top, self.params.config.vocab)
        max_steps = self.buckets.decode_steps
        if self.buckets.drafts:
            return self._launch(
                decode_speculative,
                batch,
                variant=variant.name,
                drafts=self.buckets.drafts,
                max_steps=max_steps,
                top=top,
            )
        return self._launch(step.decode, batch, variant=variant.name, max_steps=max_steps, top=top)

    def decode_structured(
        self, plan: ScheduledDecode, min_variant: SamplerVariant = PLAIN
    ) -> StepOutput:
        """Start a decode of one token per request with token bitmasks, see `decode`.

        The host computes the bitmasks while the device runs the model.
        """
        logits = self._launch(step.logits, self.batch_builder.last_tokens(plan))
        batch, variant = self.batch_builder.decode(plan, min_variant)
        started = time.perf_counter()
        bitmask = self.batch_builder.token_bitmask(plan.requests, rows=len(batch.position))
        self.stats.grammar_s += time.perf_counter() - started
        batch = dataclasses.replace(batch, token_bitmask=bitmask)
        top = min(variant.top, self.params.config.vocab)
        output = self.programs.compute(step.sample, logits, batch, variant=variant.name, top=top)
        self.stats.compilations = len(self.programs.compiled)
        return output

    def run(
        self,
        function: Step[Output],
        batch: StepInputs,
        *,
        scales: Any = None,
        **static: Any,
    ) -> Output:
        """Run a step on the pool and wait for its output. For `scales` see `Programs.call`."""
        output = self._launch(function, batch, scales=scales, **static)
        jax.block_until_ready((output, self.pages))
        return output

    def _launch(
        self,
        function: Step[Output],
        batch: StepInputs,
        *,
        scales: Any = None,
        variant: str = "",
        **static: Any,
    ) -> Output:
        """Start a step on the pool, in place, after the page copies that it depends on.

        The pages of a copy may have been freed and allocated again since it was recorded. No step
        has written to them: steps run in the order in which their copies were recorded.
        """
        copies = self.scheduler.kv_manager.copies
        for page_copies in copy_batches(copies):
            _, self.pages = self.programs.call(step.copy, page_copies, self.pages)
        copies.clear()
        output, self.pages = self.programs.call(
            function, batch, self.pages, scales=scales, variant=variant, **static
        )
        self.stats.compilations = len(self.programs.compiled)
        return output
