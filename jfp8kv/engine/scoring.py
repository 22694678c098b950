"""Scoring: log-probabilities of given tokens, computed by prefill-only requests.

`LLM.score`, `LLM.score_iter` and `prompt_logprobs` all run through here. A scored sequence is an
normal request that generates nothing. It waits for free pages, is batched with other requests, and
can be preempted. Log-probabilities are computed on the device in float32 (`step.logprobs`).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from jfp8kv.core.errors import ConfigError, DeviceMemoryError, Jfp8kvError, StepError
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.forward import PREFILL_ONLY
from jfp8kv.engine.request import PromptOutputs, Request
from jfp8kv.text.prompts import EncodedPair

SORT_WINDOW = 64  # sequences sorted by length, so that those of similar length share a batch


@dataclasses.dataclass(frozen=True)
class Scored:
    """The score of a completion.

    Attributes:
      prompt_tokens: the number of prompt tokens.
      logprobs: the log-probability of each token of the completion, given the tokens before it.
    """

    prompt_tokens: int
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A sequence to score: the tokens after its prompt, or all but the first without a prompt."""

    prompt_tokens: int
    requests: list[Request]

    @classmethod
    def of(cls, engine: Engine, pair: EncodedPair) -> "ScoreRequest":
        """Check a sequence and create its request. Raises `ConfigError` or `CapacityError`."""
        first = max(1, pair.prompt_tokens)
        if len(pair.ids) <= first:
            raise ConfigError(
                f"nothing to score: no token follows the first {len(pair.ids)}; give a sequence of "
                "at least two tokens, or a completion of at least one after a prompt."
            )
        engine.check(pair.ids, PREFILL_ONLY, what="the sequence", new_tokens=0)
        outputs = PromptOutputs.logprobs(pair.ids, first=first)
        return cls(pair.prompt_tokens, [_prefill_only(pair.ids, outputs)])

    def logprobs(self) -> np.ndarray:
        """Return the log-probabilities of the scored tokens, float32 `[scored tokens]`."""
        (request,) = self.requests
        assert request.prompt_outputs is not None
        return request.prompt_outputs.arrays[0][max(0, self.prompt_tokens - 1) :]

    def output(self) -> Scored:
        """Return the result, once the request is finished."""
        return Scored(self.prompt_tokens, self.logprobs().tolist())


def logits_request(token_ids: list[int]) -> Request:
    """Return a request for the logits after each token."""
    return _prefill_only(token_ids, PromptOutputs.logits(token_ids))


def score_iter(
    driver: EngineDriver, pairs: Iterable[EncodedPair | Jfp8kvError]
) -> Iterator[tuple[int, Scored | Jfp8kvError]]:
    """Yield `(number, result)` for each sequence, counted from 0, in the order they finish.

    The result of a sequence that cannot be encoded or scored is its error. Sequences of a failed
    step are retried one at a time, so that only the one that caused the failure gets its error.
    """
    submitted: dict[int, tuple[int, EncodedPair | Jfp8kvError]] = {}

    def by_length() -> Iterator[EncodedPair | Jfp8kvError]:
        numbered = enumerate(pairs)
        indices = itertools.count()
        while window := list(itertools.islice(numbered, SORT_WINDOW)):
            for item in sorted(window, key=lambda item: _length(item[1]), reverse=True):
                submitted[next(indices)] = item
                yield item[1]

    def new_request(pair: EncodedPair | Jfp8kvError) -> ScoreRequest:
        if isinstance(pair, Jfp8kvError):
            raise pair
        return ScoreRequest.of(driver.engine, pair)

    limit = 2 * driver.engine.buckets.max_requests
    for index, result in driver.run_iter(new_request, by_length(), limit=limit):
        number, pair = submitted.pop(index)
        if isinstance(result, StepError | DeviceMemoryError):
            ((_, result),) = driver.run_iter(new_request, [pair], limit=1)
        yield number, result


def _length(pair: EncodedPair | Jfp8kvError) -> int:
    return 0 if isinstance(pair, Jfp8kvError) else len(pair.ids)


def _prefill_only(token_ids: list[int], outputs: PromptOutputs) -> Request:
    return Request(
        token_ids,
        PREFILL_ONLY,
        np.zeros(2, np.uint32),
        max_tokens=0,
        prompt_outputs=outputs,
    )
