"""Results of dispatched steps, and post-processing of their tokens in two phases.

`commit_tokens` is on the critical path, since the device waits for the next step: token ids, the
cached length, and whether the sequence ended by a token or by its length. `emit_output` is
overlapped with the next step: text, stop strings, log-probabilities, page hashes. A stop string
is therefore found one step late, and what the device still computes for its request is dropped.
"""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from jfp8kv.engine.batch import StepOutput
from jfp8kv.engine.request import DEAD_END, NO_TOKEN, PrefillOutput, Request, Status
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill, Scheduler
from jfp8kv.engine.stats import Stats, Stopwatch
from jfp8kv.engine.step import PrefillResult


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A dispatch whose results have not been committed.

    Attributes:
      number: the number of its scheduler step.
      plan: the scheduled decode or prefill.
      output: its output, on the device.
      positions: for a prefill, the positions of each request that it runs.
    """

    number: int
    plan: ScheduledDecode | ScheduledPrefill
    output: StepOutput | PrefillResult
    positions: tuple[range, ...] = ()


class StepResults:
    """The dispatches in flight, and committed tokens whose output has not been emitted.

    Args:
      stats: counts tokens and seconds of device time.
      vocab: the vocabulary size.
      switch_length: the length at which a sequence restarts its cache (models/rope.py), if any.

    Attributes:
      in_flight: dispatches, in order.
      stopwatch: measures the time in which the engine is driven.
    """

    def __init__(self, stats: Stats, *, vocab: int, switch_length: int | None):
        self.stats = stats
        self.vocab = vocab
        self.switch_length = switch_length
        self.in_flight: deque[InFlight] = deque()
        self.stopwatch = Stopwatch()
        self._to_emit: deque[NewTokens] = deque()
        self._step = 0
        self._free_since = 0.0  # when the device last became free

    def start_step(self) -> None:
        """Start a scheduler step. Dispatches that are added later belong to it."""
        if not self.in_flight:
            self._free_since = self.stopwatch.now()
        self._step += 1

    def add(
        self,
        plan: ScheduledDecode | ScheduledPrefill,
        output: StepOutput | PrefillResult,
        positions: tuple[range, ...] = (),
    ) -> None:
        """Add a dispatch of the current step."""
        self.in_flight.append(InFlight(self._step, plan, output, positions))

    def commit(self, scheduler: Scheduler, *, wait_for_prefill: bool = False) -> None:
        """Wait for the tokens of the last step and commit them.

        Its prefill may continue, since no plan depends on its result. It is waited for one step
        later, so the host is at most one step ahead of the device.
        """
        while self.in_flight:
            first = self.in_flight[0]
            if isinstance(first.plan, ScheduledPrefill):
                if first.number == self._step and not wait_for_prefill:
                    return
                jax.block_until_ready(first.output)
                self.stats.prefill_s += self._device_seconds()
                if first.plan.output is not PrefillOutput.NONE:
                    assert not isinstance(first.output, StepOutput)
                    store_prompt_outputs(first.output, first.plan, first.positions, scheduler)
            elif any(request.status is Status.RUNNING for request in first.plan.requests):
                assert isinstance(first.output, StepOutput)
                self._commit_decode(first.output, first.plan, scheduler)
            self.in_flight.popleft()

    def _commit_decode(
        self, output: StepOutput, plan: ScheduledDecode, scheduler: Scheduler
    ) -> None:
        new_tokens = read_new_tokens(output, plan.requests, self.vocab)
        self.stats.decode_s += self._device_seconds()
        for new in new_tokens:
            if commit_tokens(new, scheduler, self.switch_length):
                self._to_emit.append(new)
        count_drafts(output, self.stats)

    def emit(self, scheduler: Scheduler) -> None:
        """Emit the output of committed tokens.

        A request that ends at a stop string may have a step in flight. Its tokens are dropped.
        """
        while self._to_emit:
            new = self._to_emit[0]
            if new.request.finish_reason is None:
                emit_output(new, scheduler, self.stats)
            self._to_emit.popleft()

    def discard(self) -> None:
        """Drop all results after a failed step, and wait for the steps that still run."""
        outputs = [dispatch.output for dispatch in self.in_flight]
        self.in_flight.clear()
        self._to_emit.clear()
        for output in outputs:
            # Running steps use memory. An error here is the reported one, or a consequence of it.
            with contextlib.suppress(Exception):
                jax.block_until_ready(output)

    def _device_seconds(self) -> float:
        """Return the seconds since the device was free, and mark it as free now."""
        before = self._free_since
        self._free_since = self.stopwatch.now()
        return self._free_since - before


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The tokens that one dispatch generated for one request.

    Log-probabilities stay on the device until they are requested.
    """

    request: Request
    token_ids: list[int]
    output: StepOutput
    row: int

    @property
    def ended(self) -> bool:
        """Whether the last of them is an end token."""
        state = self.request.sampling_state
        assert state is not None, "the request has decoded"
        return bool(self.token_ids) and self.token_ids[-1] in state.end_ids

    def logprobs(self) -> list[float]:
        """Return the log-probability of each token."""
        logprobs = np.asarray(self.output.logprobs)[self.row, : len(self.token_ids)]
        return [float(logprob) for logprob in logprobs]

    def top_logprobs(self, count: int) -> list[dict[int, float]]:
        """Return log-probabilities of the `count` most likely tokens and the sampled one, by id."""
        top: list[dict[int, float]] = [{} for _ in self.token_ids]
        if count:
            assert self.output.top is not None, "the full sampler ran"
            ids = np.asarray(self.output.top.token_ids)[self.row, :, :count].tolist()
            values = np.asarray(self.output.top.logprobs)[self.row, :, :count].tolist()
            top = [dict(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
        sampled = zip(top, self.token_ids, self.logprobs(), strict=False)
        return [likely | {token: logprob} for likely, token, logprob in sampled]


def read_new_tokens(output: StepOutput, requests: list[Request], vocab: int) -> list[NewTokens]:
    """Wait for the device, and return the new tokens of each request."""
    tokens = np.asarray(output.tokens)
    counts = np.sum(tokens < vocab, axis=1).tolist()
    return [
        NewTokens(request=request, token_ids=ids[:count], output=output, row=row)
        for row, (request, ids, count) in enumerate(
            zip(requests, tokens.tolist(), counts, strict=False)
        )
    ]


def commit_tokens(new: NewTokens, scheduler: Scheduler, switch_length: int | None) -> bool:
    """Append new tokens to their request, and finish it in the scheduler if they end it.

    Returns False, without effect, for a request that is no longer running. A sequence that grows
    past `switch_length` is recomputed (models/rope.py).
    """
    request = new.request
    if request.status is not Status.RUNNING:
        return False
    request.cached += len(new.token_ids)
    request.output_ids += new.token_ids
    complete = _grammar_complete(new)
    full = len(request.output_ids) >= request.max_tokens
    if new.ended or not new.token_ids or complete or full:
        scheduler.finish(request)
    elif switch_length is not None and request.context <= switch_length < request.num_tokens:
        scheduler.kv_manager.cache_prefix(request)
        scheduler.kv_manager.release(request)
        request.reset_for_recompute(request.num_tokens)
    return True


def emit_output(new: NewTokens, scheduler: Scheduler, stats: Stats) -> None:
    """Add committed tokens to the output of their request, and finish it if it ended."""
    request = new.request
    tokens_before = len(request.output_ids) - len(new.token_ids)
    if request.first_token is None:
        request.first_token = time.perf_counter()
    request.output_logprobs += new.logprobs()
    if request.params.logprobs is not None:
        request.top_logprobs += new.top_logprobs(request.params.logprobs)
    scheduler.kv_manager.cache_prefix(request)
    reason = _append_text(new)
    stats.generated_tokens += len(request.output_ids) - tokens_before
    if reason is None:
        request.notify()
    else:
        finish(request, reason, scheduler)


def finish(request: Request, reason: str, scheduler: Scheduler) -> None:
    """Finish a request in any state, and free the pages it still has."""
    if request.detokenizer is not None and request.detokenizer.stopped is None:
        request.text += request.detokenizer.finish()
    request.finished = time.perf_counter()
    scheduler.finish(request)
    request.finish_reason = reason
    request.notify()


def store_prompt_outputs(
    output: PrefillResult, plan: ScheduledPrefill, positions: Sequence[range], scheduler: Scheduler
) -> None:
    """Store a prefill's outputs in its requests, and finish those that generate nothing."""
    arrays = [np.asarray(array) for array in jax.tree.leaves(output)]
    for row, (request, chunk) in enumerate(zip(plan.requests, positions, strict=True)):
        outputs = request.prompt_outputs
        if outputs is None or request.finish_reason is not None:
            continue
        outputs.store(chunk, [array[row] for array in arrays])
        if request.prefill_only and outputs.complete:
            finish(request, "length", scheduler)


def count_drafts(output: StepOutput, stats: Stats) -> None:
    """Count the draft tokens that a decode verified and accepted."""
    if output.drafts is not None:
        stats.draft_tokens += int(np.asarray(output.drafts.verified).sum())
        stats.accepted_tokens += int(np.asarray(output.drafts.accepted).sum())


def _append_text(new: NewTokens) -> str | None:
    """Append the text of new tokens, truncate at a stop string, and return the finish reason."""
    request = new.request
    detokenizer = request.detokenizer
    if detokenizer is not None:
        request.text += detokenizer.push(new.token_ids[:-1] if new.ended else new.token_ids)
        if detokenizer.stopped is not None:
            _truncate_output(request, detokenizer.tokens_kept)
            request.stop_reason = detokenizer.stopped
            return "stop"
    if new.ended:
        request.stop_reason = request.special_stops.get(new.token_ids[-1], new.token_ids[-1])
        if detokenizer is not None and request.params.include_stop_str_in_output:
            request.text += detokenizer.finish()
            request.text += request.special_stops.get(new.token_ids[-1], "")
        return "stop"
    matcher = request.matcher
    if matcher is not None and (matcher.terminated if new.token_ids else matcher.accepting):
        return "stop"
    if not new.token_ids:
        request.stop_reason = (matcher and matcher.error) or NO_TOKEN
        return DEAD_END
    return "length" if len(request.output_ids) >= request.max_tokens else None


def _grammar_complete(new: NewTokens) -> bool:
    """Advance the grammar matcher, and return whether it accepts no further token."""
    matcher = new.request.matcher
    if matcher is None or new.ended:
        return False
    matcher.accept_output(new.request.output_ids)
    return matcher.terminated


def _truncate_output(request: Request, tokens: int) -> None:
    """Drop the output after its first `tokens` tokens."""
    for values in (request.output_ids, request.output_logprobs, request.top_logprobs):
        del values[tokens:]
