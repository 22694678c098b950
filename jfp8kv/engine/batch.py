"""The one border between host and device: requests become padded arrays here, and arrays become tokens again.

Padding rows have length 0 and nothing remaining: they write nothing and their results are dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from jfp8kv.cache.groups import PageRequirements
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.engine.variants import PLAIN, SamplerVariant, SamplingState, sampling_state, variant_of
from jfp8kv.sampling.settings import PAST_THE_END, SamplerSettings, stack_settings

SINCE = 64  # tokens of an output after which it is counted anew

Counts = Int32[Array | np.ndarray, "requests vocab"] | None


@pytree
class Batch:
    """What one dispatch is told of its requests. Prefill runs `tokens[i, : length[i] - start[i]]`; decode starts from the one
    token of each row at `start` and makes up to `remaining` more."""

    tokens: Int32[Array | np.ndarray, "requests tokens"]
    page_tables: Int32[Array | np.ndarray, "requests groups pages"]
    start: Int32[Array | np.ndarray, " requests"]
    length: Int32[Array | np.ndarray, " requests"]
    context: Int32[
        Array | np.ndarray, " requests"
    ]  # tokens a text had when its cache was begun (models/rope.py)
    remaining: Int32[Array | np.ndarray, " requests"]
    position: Int32[Array | np.ndarray, " requests"]  # tokens of the output so far
    end_ids: Int32[Array | np.ndarray, "requests ends"]
    settings: SamplerSettings
    most_tokens: Int32[Array | np.ndarray, ""]
    steps: Int32[Array | np.ndarray, ""]
    reported: Int32[Array | np.ndarray, ""]  # the most likeliest tokens that a request wants to see
    prompt_counts: Counts = None
    output_counts: Counts = None
    output_since: Int32[Array | np.ndarray, "requests since"] | None = (
        None  # tokens that are not in `output_counts` yet
    )
    texts: Int32[Array | np.ndarray, "requests text"] | None = (
        None  # all tokens so far, where drafts are looked up in them
    )
    allowed: UInt32[Array | np.ndarray, "requests words"] | None = (
        None  # by token, one bit each (engine/structured.py)
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Requests and tokens, both padded."""
        return self.tokens.shape


@dataclasses.dataclass(frozen=True)
class SamplerInputs:
    """What decoding rows ask of the sampler, on the device: the same from one dispatch to the next while they are the same."""

    requests: list[Request]
    rows: int
    variant: SamplerVariant
    end_ids: Int32[Array, "requests ends"]
    settings: SamplerSettings
    reported: Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often decoding rows had each token when it was last counted, on the device, `after` so many tokens of each output."""

    requests: list[Request]
    rows: int
    after: list[int]
    prompt: Counts
    output: Counts


class BatchBuilder:
    """Builds batches for a model with `vocab` tokens whose page tables have `pages` entries, numbers below `num_pages`."""

    def __init__(
        self,
        *,
        buckets: Buckets,
        vocab: int,
        requirements: PageRequirements,
        pages: int,
        num_pages: int,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        switch_length: int | None = None,
    ):
        self.buckets, self.vocab, self.eos_ids = buckets, vocab, eos_ids
        self.requirements, self.pages, self.num_pages, self.max_model_len = (
            requirements,
            pages,
            num_pages,
            max_model_len,
        )
        self.switch_length = (
            switch_length  # where texts must begin their cache anew (models/rope.py), if anywhere
        )
        self._sampled: SamplerInputs | None = None
        self._counted: TokenCounts | None = None
        self._uncounted: dict[int, Counts] = {}
        self._most_since = max(SINCE, buckets.max_new_tokens(buckets.decode_steps))

    def _asked(self, request: Request) -> SamplingState:
        return sampling_state(request, self.vocab, self.eos_ids)

    def _room(self, request: Request) -> int:
        """Tokens this request may make in one go: all it still wants, or up to the first past `switch_length`."""
        wanted = request.max_tokens - len(request.output_ids)
        if self.switch_length is None or request.num_tokens > self.switch_length:
            return wanted
        return min(wanted, self.switch_length + 1 - request.num_tokens)

    def prefill(self, plan: ScheduledPrefill) -> Batch:
        """The arrays for chunks of prompts, padded to a bucket. What only sampling needs stays one shape."""
        rows = self.buckets.prefill_rows(len(plan.requests), plan.width)
        return self._batch(
            plan.requests, plan.chunks, rows, plan.width, 1, self._settings([], rows, PLAIN)
        )

    def last(self, plan: ScheduledDecode) -> Batch:
        """The arrays for running the last token of each request, from whose logits a token is then picked."""
        rows = self.buckets.decode_rows(len(plan.requests), batch_invariant=plan.seeded)
        return self._batch(
            plan.requests, [1] * len(plan.requests), rows, 1, 1, self._settings([], rows, PLAIN)
        )

    def decode(
        self, plan: ScheduledDecode, least: SamplerVariant = PLAIN
    ) -> tuple[Batch, SamplerVariant]:
        """The arrays for a decode, padded to a bucket, and the program that serves these requests, or `least` at least."""
        rows = self.buckets.decode_rows(len(plan.requests), batch_invariant=plan.seeded)
        variant = variant_of([least, *(self._asked(r).least for r in plan.requests)])
        last = self._sampled
        if last is None or (last.requests, last.rows, last.variant) != (
            plan.requests,
            rows,
            variant,
        ):
            self._sampled = last = self._settings(plan.requests, rows, variant)
        made = self.buckets.max_new_tokens(plan.steps)
        batch = self._batch(plan.requests, [1] * len(plan.requests), rows, 1, made, last)
        prompt_counts, output_counts, since = (
            self._counts(plan.requests, rows) if variant.full else (None, None, None)
        )
        return dataclasses.replace(
            batch,
            steps=np.array(plan.steps, np.int32),
            prompt_counts=prompt_counts,
            output_counts=output_counts,
            output_since=since,
            texts=self._texts(plan.requests, rows),
        ), variant

    def _batch(
        self,
        requests: list[Request],
        chunks: list[int],
        rows: int,
        width: int,
        made: int,
        sampled: SamplerInputs,
    ) -> Batch:
        """The arrays for chunks of which the last token makes up to `made` more."""
        tokens = np.full((rows, width), self.vocab, np.int32)
        page_tables = np.full(
            (rows, len(self.requirements.groups.windows), self.pages), self.num_pages, np.int32
        )
        start, length, context, remaining, position = np.zeros((5, rows), np.int32)
        longest = 0
        for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            start[i], length[i] = request.cached, request.cached + chunk
            tokens[i, :chunk] = request.tokens(request.cached, request.cached + chunk)
            stop = min(request.cached + chunk + made - 1, request.most_tokens)
            longest, last = max(longest, stop), self.requirements.end_page(stop)
            for group, held in enumerate(request.page_tables):
                page_tables[i, group, held.first : last] = held.pages[: last - held.first]
            context[i] = request.context
            position[i] = len(request.output_ids)
            remaining[i] = self._room(request)
        return Batch(
            tokens, page_tables, start, length, context, remaining, position, sampled.end_ids, sampled.settings,
            np.array(longest, np.int32), np.array(made, np.int32), sampled.reported,
        )  # fmt: skip

    def _settings(
        self, requests: list[Request], rows: int, variant: SamplerVariant
    ) -> SamplerInputs:
        each = [self._asked(request) for request in requests]
        end_ids = np.full((rows, variant.ends), PAST_THE_END, np.int32)
        for i, one in enumerate(each):
            end_ids[i, : len(one.ends)] = sorted(one.ends)
        settings = stack_settings(
            [one.settings for one in each],
            rows=rows,
            biased=variant.biased,
            held=variant.held,
        )
        reported = np.array(max((r.params.logprobs or 0 for r in requests), default=0), np.int32)
        return SamplerInputs(
            requests, rows, variant, *jax.device_put((end_ids, settings, reported))
        )

    def _counts(self, requests: list[Request], rows: int) -> tuple[Counts, Counts, np.ndarray]:
        """How often each token occurs in prompt and output of those whose penalties need to know, and the tokens of outputs
        since that was counted: so that it crosses over now and then, and not for every dispatch."""
        since = np.full((rows, self._most_since), self.vocab, np.int32)
        if not any(request.params.counts_tokens for request in requests):
            if rows not in self._uncounted:
                self._uncounted[rows] = jnp.zeros((rows, self.vocab), jnp.int32)
            return self._uncounted[rows], self._uncounted[rows], since
        last = self._counted
        if (
            last is None
            or (last.requests, last.rows) != (requests, rows)
            or self._too_many_since(last)
        ):
            self._counted = last = self._count(requests, rows)
        for row, request, after in zip(since, requests, last.after, strict=False):
            row[: len(request.output_ids) - after] = request.output_ids[after:]
        return last.prompt, last.output, since

    def _too_many_since(self, last: TokenCounts) -> bool:
        return any(
            len(r.output_ids) - after > self._most_since
            for r, after in zip(last.requests, last.after, strict=True)
        )

    def _count(self, requests: list[Request], rows: int) -> TokenCounts:
        found = np.zeros((2, rows, self.vocab), np.int32)
        for i, request in enumerate(requests):
            if (counts := self._asked(request).counts(request.output_ids)) is not None:
                found[:, i] = counts
        return TokenCounts(
            requests,
            rows,
            [len(r.output_ids) for r in requests],
            *jax.device_put((found[0], found[1])),
        )

    def _texts(self, requests: list[Request], rows: int) -> np.ndarray | None:
        """Prompts and outputs, when drafts are looked up in them."""
        if not self.buckets.drafts:
            return None
        texts = np.full((rows, self.max_model_len), self.vocab, np.int32)
        for text, request in zip(texts, requests, strict=False):
            text[: request.num_tokens] = self._asked(request).text(request)
        return texts


@pytree
class StepOutput:
    """Tokens made per request, `vocab` past the last, and their log-probabilities; the likeliest ids if asked for; where drafts
    are verified, how many were run and how many became tokens."""

    tokens: Int32[Array, "requests steps"]
    logprobs: Float32[Array, "requests steps"]
    top_ids: Int32[Array, "requests steps top"] | None = None
    top_logprobs: Float32[Array, "requests steps top"] | None = None
    drafted: Int32[Array, " requests"] | None = None
    accepted: Int32[Array, " requests"] | None = None

    @classmethod
    def blank(cls, requests: int, steps: int, *, vocab: int, top: int) -> "StepOutput":
        """Nothing made yet."""
        return cls(
            jnp.full((requests, steps), vocab, jnp.int32),
            jnp.zeros((requests, steps), jnp.float32),
            jnp.zeros((requests, steps, top), jnp.int32) if top else None,
            jnp.zeros((requests, steps, top), jnp.float32) if top else None,
        )


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The tokens that one request got from a dispatch; the rest of what came with them is fetched when it is asked for."""

    request: Request
    token_ids: list[int]
    output: StepOutput
    row: int

    @property
    def ended(self) -> bool:
        """Whether the last of them ends its request's text."""
        return bool(self.token_ids) and self.token_ids[-1] in self.request.sampling_state.ends

    def logprobs(self) -> list[float]:
        """The log-probability of each token."""
        return np.asarray(self.output.logprobs)[self.row, : len(self.token_ids)].tolist()

    def likeliest(self, count: int) -> list[dict[int, float]]:
        """For each token the `count` likeliest ids and the one it is, with their log-probabilities."""
        found: list[dict[int, float]] = [{} for _ in self.token_ids]
        if count:
            ids, values = (
                np.asarray(x)[self.row].tolist()
                for x in (self.output.top_ids, self.output.top_logprobs)
            )
            found = [
                dict(zip(i[:count], v[:count], strict=True))
                for i, v in zip(ids, values, strict=True)
            ]
        own = zip(found, self.token_ids, self.logprobs(), strict=False)
        return [likeliest | {token: logprob} for likeliest, token, logprob in own]


def read_new_tokens(output: StepOutput, requests: list[Request], vocab: int) -> list[NewTokens]:
    """Wait for the device, and sort the tokens it made by request."""
    tokens = np.asarray(output.tokens)
    counts = np.sum(tokens < vocab, axis=1).tolist()
    return [
        NewTokens(r, ids[:count], output, i)
        for i, (r, ids, count) in enumerate(zip(requests, tokens.tolist(), counts, strict=False))
    ]
