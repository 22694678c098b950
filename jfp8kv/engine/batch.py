"""The border between host and device: padded arrays from requests, tokens from output arrays.

Padding rows have length 0 and no tokens remaining. They write nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from jfp8kv.cache.groups import PageRequirements
from jfp8kv.core.pytree import AnyArray, pytree
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.sampling.settings import PAST_THE_END, SamplerSettings, stack_settings
from jfp8kv.sampling.state import PLAIN, SamplerVariant, SamplingState, variant_of
from jfp8kv.sampling.structured import GrammarMatcher, StructuredOutput

MIN_RECENT_TOKENS = 64  # output tokens of a request that the device counts


@pytree
class ForwardBatch:
    """The inputs of one forward pass: a chunk of tokens per request, and its place in the cache.

    Request `i` runs `tokens[i, : length[i] - start[i]]`, at positions `start[i] .. length[i] - 1`.

    Attributes:
      tokens: token ids; `vocab` is padding.
      page_tables: page numbers by group of layers; `num_pages` is padding.
      start: cached tokens before this pass.
      length: cached tokens after it.
      context: the length of the sequence when its cache was started (models/rope.py).
      max_length: an upper bound on `length` over all requests and all steps of a dispatch.
    """

    tokens: Int32[AnyArray, "requests tokens"]
    page_tables: Int32[AnyArray, "requests groups pages"]
    start: Int32[AnyArray, " requests"]
    length: Int32[AnyArray, " requests"]
    context: Int32[AnyArray, " requests"]
    max_length: Int32[AnyArray, ""]

    @property
    def shape(self) -> tuple[int, int]:
        """Requests and tokens, both padded."""
        requests, tokens = self.tokens.shape
        return requests, tokens


@pytree
class LogprobsBatch:
    """The inputs of a prefill that returns log-probabilities.

    Attributes:
      forward: a chunk of each request.
      next_tokens: the token after each token of the chunk, whose log-probability is returned.
      max_logprobs: the maximum number of top log-probabilities that a request returns.
    """

    forward: ForwardBatch
    next_tokens: Int32[AnyArray, "requests tokens"]
    max_logprobs: Int32[AnyArray, ""]

    @property
    def shape(self) -> tuple[int, int]:
        """Requests and tokens, both padded."""
        return self.forward.shape


@pytree
class SamplerInputs:
    """The sampler settings of each request, constant from step to step.

    Attributes:
      settings: temperature, filters, penalties and keys.
      end_ids: the token ids that end the output.
      max_logprobs: the maximum number of top log-probabilities that a request returns.
    """

    settings: SamplerSettings
    end_ids: Int32[AnyArray, "requests ends"]
    max_logprobs: Int32[AnyArray, ""]


@pytree
class TokenCounts:
    """How often each token occurs in prompt and output, for penalties.

    Attributes:
      prompt: counts of the prompt's tokens.
      output: counts of the output's tokens.
      recent: output tokens not counted yet, padded with `vocab`; None once they are counted.
    """

    prompt: Int32[AnyArray, "requests vocab"]
    output: Int32[AnyArray, "requests vocab"]
    recent: Int32[AnyArray, "requests recent"] | None = None


@pytree
class DecodeBatch:
    """The inputs of a decode: the last token of each request, and the inputs of the sampler.

    Attributes:
      forward: the last token of each request.
      position: the number of output tokens so far.
      remaining: the maximum number of tokens to generate.
      steps: the maximum number of decode steps of this dispatch.
      sampler: the sampler settings.
      counts: token counts, for the full sampler.
      sequences: prompt and output tokens, for prompt lookup.
      token_bitmask: the tokens that grammars allow, token `i` as bit `i % 32` of word `i // 32`.
    """

    forward: ForwardBatch
    position: Int32[AnyArray, " requests"]
    remaining: Int32[AnyArray, " requests"]
    steps: Int32[AnyArray, ""]
    sampler: SamplerInputs
    counts: TokenCounts | None = None
    sequences: Int32[AnyArray, "requests positions"] | None = None
    token_bitmask: UInt32[AnyArray, "requests words"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Requests and tokens of the first step, both padded."""
        return self.forward.shape


@dataclasses.dataclass(frozen=True)
class _CachedSampler:
    """Sampler inputs on the device, and the batch they were built for."""

    requests: list[Request]
    rows: int
    variant: SamplerVariant
    inputs: SamplerInputs


@dataclasses.dataclass(frozen=True)
class _CachedCounts:
    """Token counts on the device, and the batch and output lengths they were built for."""

    requests: list[Request]
    rows: int
    counted: list[int]
    counts: TokenCounts


class BatchBuilder:
    """Builds the arrays of scheduled steps.

    Args:
      buckets: the padded shapes.
      vocab: the vocabulary size.
      requirements: which pages a sequence needs.
      page_table_length: the number of entries of a page table.
      num_pages: the number of pages in the pool; also the padding of page tables.
      max_model_len: the maximum length of a sequence.
      eos_ids: the model's end-of-sequence tokens.
      structured_output: the grammars of requests.
      switch_length: the length at which a sequence restarts its cache (models/rope.py), if any.
    """

    def __init__(
        self,
        *,
        buckets: Buckets,
        vocab: int,
        requirements: PageRequirements,
        page_table_length: int,
        num_pages: int,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        structured_output: StructuredOutput,
        switch_length: int | None = None,
    ):
        self.buckets = buckets
        self.vocab = vocab
        self.requirements = requirements
        self.page_table_length = page_table_length
        self.num_pages = num_pages
        self.max_model_len = max_model_len
        self.eos_ids = eos_ids
        self.structured_output = structured_output
        self.switch_length = switch_length
        self._sampler: _CachedSampler | None = None
        self._counts: _CachedCounts | None = None
        self._zero_counts: dict[int, Int32[Array, "requests vocab"]] = {}
        self._max_recent = max(MIN_RECENT_TOKENS, buckets.max_new_tokens(buckets.decode_steps))

    def prefill(self, plan: ScheduledPrefill) -> ForwardBatch:
        """Return the batch for a chunk of each request, padded to a bucket."""
        rows = self.buckets.prefill_rows(len(plan.requests), plan.width)
        return self._forward(plan.requests, plan.chunks, rows=rows, width=plan.width)

    def logprobs(self, plan: ScheduledPrefill) -> LogprobsBatch:
        """Return the batch for a chunk of each request, with the tokens to score."""
        forward = self.prefill(plan)
        next_tokens = np.full(forward.shape, self.vocab, np.int32)
        for row, request, chunk in zip(next_tokens, plan.requests, plan.chunks, strict=False):
            tokens = request.tokens(request.cached + 1, request.cached + chunk + 1)
            row[: len(tokens)] = tokens
        outputs = [request.prompt_outputs for request in plan.requests]
        max_logprobs = max(output.top for output in outputs if output is not None)
        return LogprobsBatch(
            forward=forward,
            next_tokens=next_tokens,
            max_logprobs=np.array(max_logprobs, np.int32),
        )

    def last_tokens(self, plan: ScheduledDecode) -> ForwardBatch:
        """Return the batch that computes the logits after the last token of each request."""
        rows = self._decode_rows(plan)
        return self._forward(plan.requests, [1] * len(plan.requests), rows=rows, width=1)

    def decode(
        self, plan: ScheduledDecode, min_variant: SamplerVariant = PLAIN
    ) -> tuple[DecodeBatch, SamplerVariant]:
        """Return the batch for a decode, padded to a bucket, and its sampler.

        The sampler serves `min_variant` and all requests.
        """
        requests = plan.requests
        rows = self._decode_rows(plan)
        variant = variant_of(
            [min_variant, *(self._state(request).required for request in requests)]
        )
        position = np.zeros(rows, np.int32)
        remaining = np.zeros(rows, np.int32)
        for row, request in enumerate(requests):
            position[row] = len(request.output_ids)
            remaining[row] = self._remaining(request)
        new_tokens = self.buckets.max_new_tokens(plan.steps)
        batch = DecodeBatch(
            forward=self._forward(
                requests, [1] * len(requests), rows=rows, width=1, new_tokens=new_tokens
            ),
            position=position,
            remaining=remaining,
            steps=np.array(plan.steps, np.int32),
            sampler=self._sampler_inputs(requests, rows, variant),
            counts=self._token_counts(requests, rows) if variant.full else None,
            sequences=self._sequences(requests, rows) if self.buckets.drafts else None,
        )
        return batch, variant

    def token_bitmask(self, requests: list[Request], *, rows: int) -> np.ndarray:
        """Return a bitmask of the tokens that each request's grammar allows next."""
        matchers = [self._matcher(request) for request in requests]
        return self.structured_output.token_bitmask(matchers, rows=rows)

    def _decode_rows(self, plan: ScheduledDecode) -> int:
        return self.buckets.decode_rows(len(plan.requests), batch_invariant=plan.seeded)

    def _state(self, request: Request) -> SamplingState:
        """Return the request's sampling state, created if needed."""
        if request.sampling_state is None:
            request.sampling_state = SamplingState(
                request.params,
                request.key,
                request.prompt_ids,
                vocab=self.vocab,
                eos_ids=self.eos_ids,
            )
        return request.sampling_state

    def _matcher(self, request: Request) -> GrammarMatcher | None:
        """Return the request's matcher at the end of its output. None without a constraint."""
        constraint = request.params.constraint
        if constraint is None:
            return None
        if request.matcher is None:
            end_ids = self._state(request).end_ids
            request.matcher = self.structured_output.new_matcher(constraint, end_ids)
        request.matcher.accept_output(request.output_ids)
        return request.matcher

    def _remaining(self, request: Request) -> int:
        """Return how many tokens to generate at most, up to the first past `switch_length`."""
        remaining = request.max_tokens - len(request.output_ids)
        if self.switch_length is None or request.num_tokens > self.switch_length:
            return remaining
        return min(remaining, self.switch_length + 1 - request.num_tokens)

    def _forward(
        self,
        requests: list[Request],
        chunks: list[int],
        *,
        rows: int,
        width: int,
        new_tokens: int = 1,
    ) -> ForwardBatch:
        """Return a batch of the next `chunks[i]` tokens of each request.

        Page tables include the pages for `new_tokens` tokens.
        """
        groups = len(self.requirements.groups.windows)
        tokens = np.full((rows, width), self.vocab, np.int32)
        page_tables = np.full((rows, groups, self.page_table_length), self.num_pages, np.int32)
        start = np.zeros(rows, np.int32)
        length = np.zeros(rows, np.int32)
        context = np.zeros(rows, np.int32)
        max_length = 0
        for row, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            stop = request.cached + chunk
            tokens[row, :chunk] = request.tokens(request.cached, stop)
            start[row] = request.cached
            length[row] = stop
            context[row] = request.context
            final = min(stop + new_tokens - 1, request.max_num_tokens)
            max_length = max(max_length, final)
            end = self.requirements.end_page(final)
            for group, table in enumerate(request.page_tables):
                page_tables[row, group, table.first : end] = table.pages[: end - table.first]
        return ForwardBatch(
            tokens=tokens,
            page_tables=page_tables,
            start=start,
            length=length,
            context=context,
            max_length=np.array(max_length, np.int32),
        )

    def _sampler_inputs(
        self, requests: list[Request], rows: int, variant: SamplerVariant
    ) -> SamplerInputs:
        """Return the sampler's settings on the device, reused while the batch is the same."""
        cached = self._sampler
        batch = (requests, rows, variant)
        if cached is None or (cached.requests, cached.rows, cached.variant) != batch:
            inputs = self._new_sampler_inputs(requests, rows, variant)
            cached = _CachedSampler(requests, rows, variant, inputs)
            self._sampler = cached
        return cached.inputs

    def _new_sampler_inputs(
        self, requests: list[Request], rows: int, variant: SamplerVariant
    ) -> SamplerInputs:
        states = [self._state(request) for request in requests]
        end_ids = np.full((rows, variant.ends), PAST_THE_END, np.int32)
        for row, state in enumerate(states):
            end_ids[row, : len(state.end_ids)] = sorted(state.end_ids)
        settings = stack_settings(
            [state.settings for state in states],
            rows=rows,
            biased=variant.biased,
            masked=variant.masked,
        )
        max_logprobs = max((request.params.logprobs or 0 for request in requests), default=0)
        inputs: SamplerInputs = jax.device_put(
            SamplerInputs(
                settings=settings, end_ids=end_ids, max_logprobs=np.array(max_logprobs, np.int32)
            )
        )
        return inputs

    def _token_counts(self, requests: list[Request], rows: int) -> TokenCounts:
        """Return token counts, and the output tokens since they were last computed.

        The counts are copied to the device only when `recent` is full, not for every dispatch.
        """
        recent = np.full((rows, self._max_recent), self.vocab, np.int32)
        if not any(request.params.counts_tokens for request in requests):
            zeros = self._zero_counts.get(rows)
            if zeros is None:
                zeros = jnp.zeros((rows, self.vocab), jnp.int32)
                self._zero_counts[rows] = zeros
            return TokenCounts(prompt=zeros, output=zeros, recent=recent)
        cached = self._counts
        if cached is None or not self._is_current(cached, requests, rows):
            cached = self._count(requests, rows)
            self._counts = cached
        for row, request, counted in zip(recent, requests, cached.counted, strict=False):
            row[: len(request.output_ids) - counted] = request.output_ids[counted:]
        return dataclasses.replace(cached.counts, recent=recent)

    def _is_current(self, cached: _CachedCounts, requests: list[Request], rows: int) -> bool:
        """Return whether the cached counts and `recent` cover all output tokens of this batch."""
        return (cached.requests, cached.rows) == (requests, rows) and all(
            len(request.output_ids) - counted <= self._max_recent
            for request, counted in zip(requests, cached.counted, strict=True)
        )

    def _count(self, requests: list[Request], rows: int) -> _CachedCounts:
        prompt = np.zeros((rows, self.vocab), np.int32)
        output = np.zeros((rows, self.vocab), np.int32)
        for row, request in enumerate(requests):
            counts = self._state(request).token_counts(request.output_ids)
            if counts is not None:
                prompt[row], output[row] = counts
        counts = jax.device_put(TokenCounts(prompt=prompt, output=output))
        return _CachedCounts(requests, rows, [len(r.output_ids) for r in requests], counts)

    def _sequences(self, requests: list[Request], rows: int) -> np.ndarray:
        """Return the prompt and output tokens of each request, padded with `vocab`."""
        sequences = np.full((rows, self.max_model_len), self.vocab, np.int32)
        for row, request in zip(sequences, requests, strict=False):
            row[: request.num_tokens] = self._state(request).token_ids(request.output_ids)
        return sequences


@pytree
class TopLogprobs:
    """The most likely tokens at each position, best first, and their log-probabilities."""

    token_ids: Int32[Array, "*positions top"]
    logprobs: Float32[Array, "*positions top"]


@pytree
class DraftCounts:
    """The numbers of verified and of accepted draft tokens of each request."""

    verified: Int32[Array, " requests"]
    accepted: Int32[Array, " requests"]


@pytree
class StepOutput:
    """The new tokens of each request, padded with `vocab`, and their log-probabilities.

    The full sampler returns `top`, and speculative decoding returns `drafts`.
    """

    tokens: Int32[Array, "requests steps"]
    logprobs: Float32[Array, "requests steps"]
    top: TopLogprobs | None = None
    drafts: DraftCounts | None = None

    @classmethod
    def empty(cls, requests: int, steps: int, *, vocab: int, top: int) -> "StepOutput":
        """Return an output without tokens."""
        shape = (requests, steps)
        no_top = TopLogprobs(
            token_ids=jnp.zeros((*shape, top), jnp.int32),
            logprobs=jnp.zeros((*shape, top), jnp.float32),
        )
        return cls(
            tokens=jnp.full(shape, vocab, jnp.int32),
            logprobs=jnp.zeros(shape, jnp.float32),
            top=no_top if top else None,
        )
