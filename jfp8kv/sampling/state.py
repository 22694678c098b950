"""Per-request sampling state on the host, and the choice of the compiled sampler for a batch.

There are two compiled samplers. The plain one draws tokens. The full one also counts tokens for
penalties, adds `logit_bias`, masks end tokens for `min_tokens` and returns top log-probabilities.
Its arrays of ids are long enough for nearly all requests. A request with more ids needs a separate
program, which is compiled when the first such request decodes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jfp8kv.sampling.params import MAX_LOGPROBS, SamplingParams
from jfp8kv.sampling.settings import SamplerSettings, bucket, settings_from


@dataclasses.dataclass(frozen=True)
class SamplerVariant:
    """The static shape of a sampler.

    Attributes:
      ends: the number of end token ids per request.
      biased: the number of `logit_bias` ids per request.
      full: whether penalties, `min_tokens` and top log-probabilities are computed.
    """

    ends: int
    biased: int
    full: bool

    @property
    def name(self) -> str:
        """The name of the sampler in `llm.compile_report()`."""
        if self in (PLAIN, FULL):
            return "full" if self.full else "plain"
        return f"full, {self.ends} ends, {self.biased} biased"

    @property
    def masked(self) -> int:
        """The number of ids that `min_tokens` masks per request: the end tokens."""
        return self.ends if self.full else 0

    @property
    def top(self) -> int:
        """The number of top log-probabilities per token."""
        return MAX_LOGPROBS if self.full else 0

    def serves(self, other: "SamplerVariant") -> bool:
        """Return whether this sampler supports all requests that `other` supports."""
        return self.ends >= other.ends and self.biased >= other.biased and self.full >= other.full


PLAIN = SamplerVariant(ends=8, biased=0, full=False)
FULL = SamplerVariant(ends=64, biased=512, full=True)


def variant_of(required: Sequence[SamplerVariant]) -> SamplerVariant:
    """Return the smallest compiled sampler that serves all of `required`."""
    needed = SamplerVariant(
        ends=max(variant.ends for variant in required),
        biased=max(variant.biased for variant in required),
        full=any(variant.full for variant in required),
    )
    for variant in (PLAIN, FULL):
        if variant.serves(needed):
            return variant
    return SamplerVariant(
        ends=max(FULL.ends, bucket(needed.ends)),
        biased=max(FULL.biased, bucket(needed.biased)),
        full=True,
    )


class SamplingState:
    """The sampling state of one request, created when it first decodes.

    Args:
      params: the sampling parameters of the request.
      key: its random key.
      prompt_ids: the token ids of its prompt.
      vocab: the vocabulary size.
      eos_ids: the model's end-of-sequence tokens.

    Attributes:
      end_ids: the token ids that end the output.
      settings: the request's row of the batched sampler settings.
      required: the smallest sampler that serves the request.
    """

    def __init__(
        self,
        params: SamplingParams,
        key: np.ndarray,
        prompt_ids: Sequence[int],
        *,
        vocab: int,
        eos_ids: tuple[int, ...],
    ):
        eos = () if params.ignore_eos else eos_ids
        self.end_ids = frozenset(params.stop_token_ids) | frozenset(eos)
        self.settings: SamplerSettings = settings_from(params, key, eos_ids=eos_ids)
        full = (
            params.counts_tokens
            or params.min_tokens > 0
            or bool(params.logprobs)
            or bool(params.logit_bias)
        )
        self.required = SamplerVariant(len(self.end_ids), len(params.logit_bias or ()), full)
        self._counts: np.ndarray | None = None
        if params.counts_tokens:
            prompt = np.bincount(prompt_ids, minlength=vocab)
            self._counts = np.stack([prompt, np.zeros(vocab)]).astype(np.int32)
        self._counted = 0
        self._prompt_ids = np.array(prompt_ids, np.int32)

    def token_counts(self, output_ids: Sequence[int]) -> np.ndarray | None:
        """Return the counts of each token in prompt and output, int32 `[2, vocab]`.

        None for a request without penalties.
        """
        if self._counts is not None:
            np.add.at(self._counts[1], output_ids[self._counted :], 1)
            self._counted = len(output_ids)
        return self._counts

    def token_ids(self, output_ids: Sequence[int]) -> np.ndarray:
        """Return the prompt tokens followed by the output tokens, int32."""
        return np.concatenate([self._prompt_ids, np.array(output_ids, np.int32)])
