"""One sequence being generated, and what the user gets back. Plain host state."""

import dataclasses
import enum
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfp8kv.core.errors import Jfp8kvError
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.detokenizer import Detokenizer


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation.

    `logprobs`: when asked for, a dict `{token id: log-probability}` per token, of the likeliest and the sampled one.
    `finish_reason`: "stop" (an end token or stop string, named in `stop_reason`, or the end of what the text was to look like),
    "length", "deadline", or "dead_end" where no token was left to choose, for the reason in `stop_reason`.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    cumulative_logprob: float = 0.0


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its `n` continuations, with `best_of` the best first. `text` and `token_ids` are the first one's."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = (
        None  # if asked for; None for the first token
    )
    first_token_s: float | None = (
        None  # seconds from submission to the first token of any continuation
    )
    total_s: float | None = None  # seconds from submission to the last token of all

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids


DEADLINE = "deadline"  # the finish reason of what ran out of time
DEAD_END = "dead_end"  # of what has no token left to go on with
CANCELLED = "cancelled"  # of what was dropped, which no caller sees; `error` says why if that was not its doing
NO_TOKEN = "logit_bias, min_tokens and what the text must look like leave no token"  # the stop reason of a dead end


class Status(enum.Enum):
    """The state of a request in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class PrefillOutput(enum.Enum):
    """What a prefill returns for each token, besides filling the KV cache."""

    NONE = "none"
    LOGPROBS = "logprobs"  # the log-probability of the next token, and the top ones
    LOGITS = "logits"


@dataclasses.dataclass(eq=False)
class PromptOutputs:
    """Outputs of the tokens of a prompt, collected chunk by chunk while it is prefilled.

    Attributes:
      kind: what the outputs are.
      next: the first position whose output is requested and missing.
      stop: the position behind the last one whose output is requested.
      top: top log-probabilities per token.
      arrays: the outputs so far, `[stop, ...]` each.
    """

    kind: PrefillOutput
    next: int
    stop: int
    top: int = 0
    arrays: list[np.ndarray] = dataclasses.field(default_factory=list)

    @classmethod
    def logprobs(cls, token_ids: list[int], *, first: int = 1, top: int = 0) -> "PromptOutputs":
        """Request the log-probabilities of a prompt's tokens from `first` on.

        `top`: the number of most likely tokens to return with each.
        """
        return cls(PrefillOutput.LOGPROBS, first - 1, len(token_ids) - 1, top)

    @classmethod
    def logits(cls, token_ids: list[int]) -> "PromptOutputs":
        """Request the logits after each token of a prompt."""
        return cls(PrefillOutput.LOGITS, 0, len(token_ids))

    @property
    def complete(self) -> bool:
        return self.next >= self.stop

    def top_logprobs(self, prompt_ids: list[int]) -> list[dict[int, float] | None]:
        """Return the log-probability of each prompt token and of the most likely ones, by token id.

        None for tokens without one: the first, and those not scored before a deadline.
        """
        found: list[dict[int, float] | None] = [None] * len(prompt_ids)
        if not self.arrays:
            return found
        values, top_ids, top_values = self.arrays
        for position in range(self.next):
            token = prompt_ids[position + 1]
            ids = top_ids[position, : self.top].tolist()
            logprobs = top_values[position, : self.top].tolist()
            found[position + 1] = dict(zip(ids, logprobs, strict=True)) | {
                token: float(values[position])
            }
        return found

    def store(self, positions: range, outputs: Sequence[np.ndarray]) -> None:
        """Store the outputs of a chunk at `positions`. Rows past the chunk are padding."""
        if not self.arrays:
            self.arrays = [np.zeros((self.stop, *x.shape[1:]), x.dtype) for x in outputs]
        stop = min(positions.stop, self.stop)
        for array, output in zip(self.arrays, outputs, strict=True):
            array[positions.start : stop] = output[: stop - positions.start]
        self.next = max(self.next, stop)


@dataclasses.dataclass(eq=False)
class Request:
    """A sequence in the engine: the prompt, what was generated, and where its tokens lie.

    `cached` counts tokens whose keys and values are in the cache. A running request that is one token short is decoding; with
    more missing it is still prefilling.
    """

    prompt_ids: list[int]
    params: SamplingParams
    key: Any  # uint32[2]: the random key of this sequence
    max_tokens: int  # of output: what the parameters ask for, as far as the context has room
    index: int = 0  # which of the n continuations of its prompt
    prompt_outputs: PromptOutputs | None = None  # scores or logits of the prompt, if requested
    detokenizer: Detokenizer | None = None
    sampling_state: Any = (
        None  # `params` for the device, made when first needed (engine/sampler_state.py)
    )
    matcher: Any = None  # what it is held to, made when first needed (engine/structured.py)
    status: Status = Status.WAITING
    output_ids: list[int] = dataclasses.field(default_factory=list)
    output_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    page_tables: list[Any] = dataclasses.field(
        default_factory=list
    )  # its pages, by group of layers (engine/kv_manager.py)
    page_hashes: list[bytes] = dataclasses.field(
        default_factory=list
    )  # of its full pages, as far as they were needed
    cached: int = 0
    context: int = (
        0  # tokens there were when the cache was begun: the prompt's, unless it was begun anew
    )
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: Jfp8kvError | None = None  # why the engine dropped it, if it did
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None

    def __post_init__(self) -> None:
        self.context = self.context or len(self.prompt_ids)

    def reset_for_recompute(self, context: int | None = None) -> None:
        """Forget what is cached: every token so far is to be run again, as a text that had `context` tokens (as many as before)
        when its cache was begun. Its pages were given back."""
        assert not self.page_tables
        self.cached = 0
        if context is not None:
            self.context, self.page_hashes = context, []

    @property
    def deadline(self) -> float:
        """When it is to end at the latest, on the clock of `submitted`."""
        return (
            math.inf if self.params.deadline_s is None else self.submitted + self.params.deadline_s
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def most_tokens(self) -> int:
        """Prompt and output tokens at the most."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def uncached(self) -> int:
        """Tokens not in the cache yet; the last of them is run when the next token is made."""
        return self.num_tokens - self.cached

    @property
    def prefill_only(self) -> bool:
        """Whether the request is finished once its prompt outputs are computed."""
        return self.max_tokens == 0

    @property
    def prefill_tokens(self) -> int:
        """Tokens left to prefill. The last token of a request that generates is left to decode."""
        if self.prefill_only and self.prompt_outputs is not None:
            return self.prompt_outputs.stop - self.cached
        return self.uncached - 1

    @property
    def prefilling(self) -> bool:
        return self.prefill_tokens > 0

    @property
    def prefill_output(self) -> PrefillOutput:
        """What the next prefill of this request must return."""
        outputs = self.prompt_outputs
        return PrefillOutput.NONE if outputs is None or outputs.complete else outputs.kind

    @property
    def max_prefix(self) -> int:
        """The most tokens to reuse from the prefix cache: those whose outputs are not needed."""
        if self.prompt_outputs is None or self.prompt_outputs.complete:
            return sys.maxsize
        return self.prompt_outputs.next

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions `start .. stop-1`, prompt and output as one sequence."""
        prompt = len(self.prompt_ids)
        return (
            self.prompt_ids[start:stop]
            + self.output_ids[max(0, start - prompt) : max(0, stop - prompt)]
        )

    def output(self) -> CompletionOutput:
        """What was generated so far, as the user sees it."""
        wanted = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.output_ids),
            logprobs=list(self.top_logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=float(sum(self.output_logprobs)),
        )
