"""What requests ask of their sampler, sorted into the few decode programs that serve all of it.

The plain program draws tokens. The full one does everything else as well: it counts tokens for penalties, adds `logit_bias`,
holds ends off for `min_tokens` and reports the likeliest tokens. Its lists of ids are long enough for practically every
request; longer ones get a program of their own, compiled when the first such request comes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jfp8kv.engine.request import Request
from jfp8kv.sampling.params import MAX_LOGPROBS
from jfp8kv.sampling.settings import SamplerSettings, bucket, settings_from


@dataclasses.dataclass(frozen=True)
class SamplerVariant:
    """What a decode is compiled for: the most ids that end a text, the most biased ids, and what it counts and reports."""

    ends: int
    biased: int
    full: bool

    @property
    def name(self) -> str:
        """As `llm.compile_report()` has it."""
        if self in (PLAIN, FULL):
            return "full" if self.full else "plain"
        return f"full, {self.ends} ends, {self.biased} biased"

    @property
    def held(self) -> int:
        """The most ids that `min_tokens` holds off: those that end a text."""
        return self.ends if self.full else 0

    @property
    def top(self) -> int:
        """How many likeliest tokens are reported."""
        return MAX_LOGPROBS if self.full else 0

    def serves(self, other: "SamplerVariant") -> bool:
        """Whether what `other` serves is served too."""
        return self.ends >= other.ends and self.biased >= other.biased and self.full >= other.full


PLAIN = SamplerVariant(ends=8, biased=0, full=False)
FULL = SamplerVariant(ends=64, biased=512, full=True)


def variant_of(sampling_state: Sequence[SamplerVariant]) -> SamplerVariant:
    """The program that serves all of these."""
    least = SamplerVariant(
        max(a.ends for a in sampling_state),
        max(a.biased for a in sampling_state),
        any(a.full for a in sampling_state),
    )
    return next((v for v in (PLAIN, FULL) if v.serves(least)), None) or SamplerVariant(
        max(FULL.ends, bucket(least.ends)), max(FULL.biased, bucket(least.biased)), full=True
    )


class SamplingState:
    """What one request asks of its sampler, made when it first decodes and kept on the host: `settings` for the device, the
    `ends` of its text, and how often each token came before if penalties want to know."""

    def __init__(self, request: Request, vocab: int, eos_ids: tuple[int, ...]):
        params = request.params
        self.ends = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_ids)
        )
        self.settings: SamplerSettings = settings_from(params, request.key, eos_ids=eos_ids)
        self._counts = np.zeros((2, vocab), np.int32) if params.counts_tokens else None
        if self._counts is not None:
            self._counts[0] = np.bincount(request.prompt_ids, minlength=vocab)
        self._counted = 0
        self._prompt: np.ndarray | None = None
        full = (
            params.counts_tokens
            or params.min_tokens > 0
            or bool(params.logprobs)
            or bool(params.logit_bias)
        )
        self.least = SamplerVariant(len(self.ends), len(params.logit_bias or ()), full)

    def counts(self, output_ids: list[int]) -> np.ndarray | None:
        """How often each token occurs in the prompt and in the output, `[2, vocab]`; None if nobody wants to know."""
        if self._counts is not None:
            np.add.at(self._counts[1], output_ids[self._counted :], 1)
            self._counted = len(output_ids)
        return self._counts

    def text(self, request: Request) -> np.ndarray:
        """Its prompt and output, int32."""
        if self._prompt is None:
            self._prompt = np.array(request.prompt_ids, np.int32)
        return np.concatenate([self._prompt, np.array(request.output_ids, np.int32)])


def sampling_state(request: Request, vocab: int, eos_ids: tuple[int, ...]) -> SamplingState:
    """What `request` asks of its sampler."""
    if request.sampling_state is None:
        request.sampling_state = SamplingState(request, vocab, eos_ids)
    return request.sampling_state
