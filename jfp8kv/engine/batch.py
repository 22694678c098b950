"""The one border between host and device: requests become padded arrays here, and arrays become tokens again.

Padding rows have length 0 and nothing remaining: they write nothing and their results are dropped.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32

from jfp8kv.cache.groups import PageNeeds
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import Decode, Plan, Prefill
from jfp8kv.sampling.settings import PAST_THE_END, SamplerSettings, bucket, settings_from, stack_settings

Counts = Int32[Array | np.ndarray, "requests vocab"] | None


@pytree
class Batch:
    """What one dispatch is told of its requests. Prefill runs `tokens[i, : length[i] - start[i]]`; decode starts from the one
    token of each row at `start` and makes up to `remaining` more."""

    tokens: Int32[Array | np.ndarray, "requests tokens"]
    page_tables: Int32[Array | np.ndarray, "requests groups pages"]
    start: Int32[Array | np.ndarray, " requests"]
    length: Int32[Array | np.ndarray, " requests"]
    context: Int32[Array | np.ndarray, " requests"]  # tokens a text had when its cache was begun (models/rope.py)
    remaining: Int32[Array | np.ndarray, " requests"]
    position: Int32[Array | np.ndarray, " requests"]  # tokens of the output so far
    end_ids: Int32[Array | np.ndarray, "requests ends"]
    settings: SamplerSettings
    most_tokens: Int32[Array | np.ndarray, ""]
    steps: Int32[Array | np.ndarray, ""]
    prompt_counts: Counts = None
    output_counts: Counts = None

    @property
    def shape(self) -> tuple[int, int]:
        """Requests and tokens, both padded."""
        return self.tokens.shape


@dataclasses.dataclass(frozen=True)
class Made:
    """The tokens one request got from a dispatch, with their log-probabilities and, if asked for, the likeliest ones."""

    token_ids: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]


class Batcher:
    """Builds batches for a model with `vocab` tokens whose page tables have `pages` entries, numbers below `num_pages`."""

    def __init__(
        self,
        *,
        buckets: Buckets,
        vocab: int,
        needs: PageNeeds,
        pages: int,
        num_pages: int,
        eos_ids: tuple[int, ...],
        switch_length: int | None = None,
    ):
        self.buckets, self.vocab, self.eos_ids = buckets, vocab, eos_ids
        self.needs, self.pages, self.num_pages = needs, pages, num_pages
        self.switch_length = switch_length  # where texts must begin their cache anew (models/rope.py), if anywhere

    def end_ids(self, request: Request) -> set[int]:
        """The ids that end this request's text."""
        return set(request.params.stop_token_ids) | (set() if request.params.ignore_eos else set(self.eos_ids))

    def _room(self, request: Request) -> int:
        """Tokens this request may make in one go: all it still wants, or up to the first past `switch_length`."""
        wanted = request.max_tokens - len(request.output_ids)
        if self.switch_length is None or request.num_tokens > self.switch_length:
            return wanted
        return min(wanted, self.switch_length + 1 - request.num_tokens)

    def build(self, plan: Plan) -> Batch:
        """The arrays for `plan`, padded to a bucket."""
        requests = plan.requests
        chunks = plan.chunks if isinstance(plan, Prefill) else [1] * len(requests)
        width = plan.width if isinstance(plan, Prefill) else 1
        steps = plan.steps if isinstance(plan, Decode) else 1
        rows = self.buckets.requests(len(requests))

        tokens = np.full((rows, width), self.vocab, np.int32)
        page_tables = np.full((rows, len(self.needs.groups.windows), self.pages), self.num_pages, np.int32)
        start, length, context, remaining, position = np.zeros((5, rows), np.int32)
        sampled = requests if isinstance(plan, Decode) else []  # prefill has no use for the rest: it stays one shape
        ends = [self.end_ids(r) for r in sampled]
        end_ids = np.full((rows, bucket(max([1, *map(len, ends)]))), PAST_THE_END, np.int32)
        for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            start[i], length[i] = request.cached, request.cached + chunk
            tokens[i, :chunk] = request.tokens(request.cached, request.cached + chunk)
            stop = min(request.cached + chunk + steps - 1, request.most_tokens)
            last = self.needs.holding(stop)
            for group, held in enumerate(request.held):
                page_tables[i, group, held.first : last] = held.pages[: last - held.first]
            context[i] = request.context
            position[i] = len(request.output_ids)
            remaining[i] = self._room(request)
        for i, ids in enumerate(ends):
            end_ids[i, : len(ids)] = sorted(ids)

        longest = max(min(r.cached + c + steps - 1, r.most_tokens) for r, c in zip(requests, chunks, strict=True))
        settings = stack_settings([self._settings(r) for r in sampled], rows=rows)
        prompt_counts, output_counts = self._counts(sampled, rows)
        return Batch(
            tokens, page_tables, start, length, context, remaining, position, end_ids, settings,
            np.array(longest, np.int32), np.array(steps, np.int32), prompt_counts, output_counts,
        )  # fmt: skip

    def _settings(self, request: Request) -> SamplerSettings:
        if request.settings is None:
            request.settings = settings_from(request.params, request.key, eos_ids=self.eos_ids)
        return request.settings

    def _counts(self, requests: list[Request], rows: int) -> tuple[Counts, Counts]:
        """How often each token occurs in prompt and output, when some request's penalties need to know."""
        if not any(r.params.counts_tokens for r in requests):
            return None, None
        counts = np.zeros((2, rows, self.vocab), np.int32)
        for i, request in enumerate(requests):
            counts[0, i] = np.bincount(request.prompt_ids, minlength=self.vocab)
            counts[1, i] = np.bincount(np.asarray(request.output_ids, np.int64), minlength=self.vocab)
        return counts[0], counts[1]


@pytree
class StepOutput:
    """Tokens made per request, `vocab` past the last, and their log-probabilities; the likeliest ids if asked for."""

    tokens: Int32[Array, "requests steps"]
    logprobs: Float32[Array, "requests steps"]
    top_ids: Int32[Array, "requests steps top"] | None = None
    top_logprobs: Float32[Array, "requests steps top"] | None = None


def read(output: StepOutput, requests: list[Request], vocab: int) -> list[Made]:
    """Wait for the device and sort its results by request."""
    output = jax.device_get(output)
    made = []
    for i, request in enumerate(requests):
        token_ids = [int(t) for t in output.tokens[i] if t < vocab]
        logprobs = [float(x) for x in output.logprobs[i, : len(token_ids)]]
        wanted = request.params.logprobs
        top = [_top(output, i, j, wanted) | {t: logprobs[j]} for j, t in enumerate(token_ids)] if wanted is not None else []
        made.append(Made(token_ids, logprobs, top))
    return made


def _top(output: StepOutput, row: int, step: int, count: int) -> dict[int, float]:
    if not count:
        return {}
    ids, values = output.top_ids[row, step, :count], output.top_logprobs[row, step, :count]
    return {int(t): float(x) for t, x in zip(ids, values, strict=True)}
