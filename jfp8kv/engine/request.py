"""Requests of one sequence each, and the outputs that users get."""

import dataclasses
import enum
import math
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from jfp8kv.cache.allocator import PageTable
from jfp8kv.core.errors import Jfp8kvError
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.state import SamplingState
from jfp8kv.sampling.structured import GrammarMatcher
from jfp8kv.text.detokenizer import Detokenizer

DEADLINE = "deadline"  # finish reason: out of time
DEAD_END = "dead_end"  # finish reason: no token is allowed next
CANCELLED = "cancelled"  # finish reason: cancelled by the caller, or aborted with an error
NO_TOKEN = "logit_bias, min_tokens and the structured output leave no token"  # a stop reason


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation.

    Attributes:
      index: its index in `RequestOutput.outputs`.
      text: the generated text, without end token or stop string; "" without a tokenizer.
      token_ids: the generated tokens, the end token included.
      logprobs: if requested, `{token id: log-probability}` for each generated token, with the most
        likely ids and the sampled one.
      finish_reason: "stop" (an end token, a stop string, or the end of the structured output),
        "length", "deadline", or "dead_end" if no token was allowed next; None while it runs.
      stop_reason: the end token or stop string of "stop", or the cause of "dead_end".
      cumulative_logprob: the sum of the log-probabilities of `token_ids`.

    Example:
      >>> for completion in llm.generate("Once upon a time", n=2, max_tokens=8)[0].outputs:
      ...     print(completion.index, completion.finish_reason, completion.text)
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
    """A prompt and its continuations.

    Attributes:
      prompt: the text of the prompt; None if it was given as token ids.
      prompt_token_ids: the token ids of the prompt.
      outputs: `n` continuations, the best first if `best_of` was given.
      prompt_logprobs: if requested, `{token id: log-probability}` for each prompt token; None for
        the first, and for tokens not scored before a deadline.
      first_token_s: seconds from submission to the first token of any continuation.
      total_s: seconds from submission to the last token of all continuations.

    Example:
      >>> (output,) = llm.generate("Once upon a time", max_tokens=8)
      >>> output.text, output.outputs[0].finish_reason
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = None
    first_token_s: float | None = None
    total_s: float | None = None

    @property
    def text(self) -> str:
        """The text of the first continuation."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the first continuation."""
        return self.outputs[0].token_ids


class Status(enum.Enum):
    """The state of a request in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class PrefillOutput(enum.Enum):
    """What a prefill returns for each token. All kinds fill the KV cache."""

    NONE = "none"
    LOGPROBS = "logprobs"  # the log-probability of the next token, and the top ones
    LOGITS = "logits"


@dataclasses.dataclass(eq=False)
class PromptOutputs:
    """Outputs of the tokens of a prompt, collected chunk by chunk while it is prefilled.

    Attributes:
      kind: log-probabilities or logits.
      next: the first position whose output is requested and missing.
      stop: one past the last position whose output is requested.
      top: the number of top log-probabilities per token.
      arrays: the outputs so far, each `[stop, ...]`.
    """

    kind: PrefillOutput
    next: int
    stop: int
    top: int = 0
    arrays: list[np.ndarray] = dataclasses.field(default_factory=list)

    @classmethod
    def logprobs(cls, token_ids: list[int], *, first: int = 1, top: int = 0) -> "PromptOutputs":
        """Request the log-probability of each prompt token from index `first` on.

        `top` is the number of top log-probabilities to return with each.
        """
        return cls(PrefillOutput.LOGPROBS, first - 1, len(token_ids) - 1, top)

    @classmethod
    def logits(cls, token_ids: list[int]) -> "PromptOutputs":
        """Request the logits after each prompt token."""
        return cls(PrefillOutput.LOGITS, 0, len(token_ids))

    @property
    def complete(self) -> bool:
        return self.next >= self.stop

    def top_logprobs(self, prompt_ids: list[int]) -> list[dict[int, float] | None]:
        """Return the log-probabilities of each prompt token and the most likely ones, by token id.

        The entry is None for the first token and for tokens not scored before a deadline.
        """
        result: list[dict[int, float] | None] = [None] * len(prompt_ids)
        if not self.arrays:
            return result
        values, top_ids, top_values = self.arrays
        for position in range(self.next):
            token = prompt_ids[position + 1]
            ids = top_ids[position, : self.top].tolist()
            logprobs = top_values[position, : self.top].tolist()
            result[position + 1] = dict(zip(ids, logprobs, strict=True)) | {
                token: float(values[position])
            }
        return result

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
    """A sequence in the engine: its prompt, its output so far and its pages.

    A running request decodes when all tokens but the last are cached, and prefills otherwise.

    Attributes:
      key: the random key of the sequence, uint32 `[2]`.
      max_tokens: the maximum number of output tokens, also limited by the context length.
      index: the index among the continuations of the prompt.
      prompt_outputs: log-probabilities or logits of the prompt, if requested.
      special_stops: stop strings that are special tokens, by token id.
      on_update: called after new output, and when the request finishes.
      sampling_state, matcher: created at the first decode; `matcher` only for structured output.
      page_tables: one for each group of layers.
      page_hashes: the prefix-cache keys of the first full pages.
      cached: the number of tokens whose keys and values are in the cache.
      context: the length of the sequence when its cache was started, see `reset_for_recompute`.
      error: why the engine aborted the request.
      submitted, first_token, finished: times, in seconds.
    """

    prompt_ids: list[int]
    params: SamplingParams
    key: np.ndarray
    max_tokens: int
    index: int = 0
    prompt_outputs: PromptOutputs | None = None
    detokenizer: Detokenizer | None = None
    special_stops: dict[int, str] = dataclasses.field(default_factory=dict)
    on_update: Callable[["Request"], object] | None = None
    sampling_state: SamplingState | None = None
    matcher: GrammarMatcher | None = None
    status: Status = Status.WAITING
    output_ids: list[int] = dataclasses.field(default_factory=list)
    output_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    page_tables: list[PageTable] = dataclasses.field(default_factory=list)
    page_hashes: list[bytes] = dataclasses.field(default_factory=list)
    cached: int = 0
    context: int = 0
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: Jfp8kvError | None = None
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None

    def __post_init__(self) -> None:
        self.context = self.context or len(self.prompt_ids)

    def reset_for_recompute(self, context: int | None = None) -> None:
        """Mark every token as not cached. The caller has freed the pages.

        Some RoPE variants depend on the length of the sequence when its cache was started.
        `context` sets that length.
        """
        assert not self.page_tables
        self.cached = 0
        if context is not None:
            self.context = context
            self.page_hashes = []

    def abort(self, error: Jfp8kvError) -> None:
        """End the request with `error`. Its pages are freed by the caller."""
        self.status = Status.FINISHED
        self.page_tables = []
        self.error = error
        self.finish_reason = CANCELLED

    def notify(self) -> None:
        """Call `on_update`."""
        if self.on_update is not None:
            self.on_update(self)

    @property
    def deadline(self) -> float:
        """The time at which the request is finished early, on the clock of `submitted`."""
        if self.params.deadline_s is None:
            return math.inf
        return self.submitted + self.params.deadline_s

    @property
    def num_tokens(self) -> int:
        """The number of prompt and output tokens so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_num_tokens(self) -> int:
        """The maximum number of prompt and output tokens."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def uncached(self) -> int:
        """The number of tokens that are not cached. Decode runs the last of them."""
        return self.num_tokens - self.cached

    @property
    def prefill_only(self) -> bool:
        """Whether the request is finished once its prompt outputs are computed."""
        return self.max_tokens == 0

    @property
    def prefill_tokens(self) -> int:
        """The number of tokens left to prefill. Decode runs the last one if output is generated."""
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
        """The longest prefix that the prefix cache may provide: its outputs are not requested."""
        if self.prompt_outputs is None or self.prompt_outputs.complete:
            return sys.maxsize
        return self.prompt_outputs.next

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the token ids at positions `start .. stop-1` of prompt and output."""
        prompt = len(self.prompt_ids)
        output = self.output_ids[max(0, start - prompt) : max(0, stop - prompt)]
        return self.prompt_ids[start:stop] + output

    def output(self) -> CompletionOutput:
        """Return the output so far."""
        wants_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.output_ids),
            logprobs=list(self.top_logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=float(sum(self.output_logprobs)),
        )
