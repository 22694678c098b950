"""Beam search: the most likely continuations of a prompt, by forking and extending sessions.

Each round extends up to `beams` sequences, the *beams*, by one token. All continuations are
ranked by the sum of the log-probabilities of their output tokens, at temperature 1. Among the first
`beams` of them, those that end (by an end token, or at `max_tokens`) are *finished*. The first
`beams` of the others are the beams of the next round. The score of a finished sequence is
`sum / tokens ** length_penalty`, its end token included. The `beams` best are returned.

The search stops after `max_tokens`, when no beam is left, or when `beams` sequences are finished
and no beam can become one of the best. `early_stopping` selects the last criterion:

- False (the default) compares the score that the best beam has now,
- "never" compares the best score that it can reach within `max_tokens`,
- True compares nothing: the first `beams` finished sequences are returned.

These are the rules of Hugging Face's `generate(num_beams=)`. vLLM always runs `max_tokens` rounds,
and counts prompt tokens in the length.

Source: the search of Graves (2012, "Sequence transduction with recurrent neural networks",
section 4), with the length normalization of Wu et al. (2016, arXiv:1609.08144, section 7) as a
plain power.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

import numpy as np

from jfp8kv.core.errors import CapacityError, ConfigError, invalid_choice
from jfp8kv.engine.request import CompletionOutput, RequestOutput
from jfp8kv.llm import LLM
from jfp8kv.request_group import PROMPT_CONTEXT
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.session import Session, extend_batch
from jfp8kv.text.detokenizer import Detokenizer
from jfp8kv.text.prompts import Encoded, PromptLike, as_list, encode

EarlyStopping: TypeAlias = bool | Literal["never"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A beam, or a continuation of a beam.

    Attributes:
      token_ids: output tokens.
      logprob: the sum of their log-probabilities.
      parent: the index of the beam that was continued.
    """

    token_ids: tuple[int, ...]
    logprob: float
    parent: int = 0

    def score(self, length_penalty: float, tokens: int | None = None) -> float:
        """Return the log-probability normalized by `tokens`, or by the length if None."""
        return self.logprob / (tokens or len(self.token_ids)) ** length_penalty


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Checked options of a search.

    Attributes:
      beams, length_penalty, early_stopping: as for `beam_search`.
      end_ids: the tokens that finish a sequence.
    """

    beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    end_ids: Collection[int]

    def __post_init__(self) -> None:
        if isinstance(self.beams, bool) or not isinstance(self.beams, int) or self.beams < 1:
            raise ConfigError(f"beams={self.beams!r}: must be a positive integer.")
        if isinstance(self.length_penalty, bool) or not isinstance(
            self.length_penalty, int | float
        ):
            raise ConfigError(f"length_penalty={self.length_penalty!r}: must be a number.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty={self.length_penalty!r}: must be finite.")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise invalid_choice("early_stopping", self.early_stopping, ("True", "False", "never"))

    def expand(self, beams: Sequence[Candidate], logprobs: np.ndarray) -> list[Candidate]:
        """Return the most likely continuations by one token, the best first.

        There are enough of them that at least `beams` do not end. Ties go to the earlier beam, then
        to the smaller token id.

        Args:
          beams: the beams to continue.
          logprobs: log-probabilities of the next token of each beam, float64 `[beams, vocab]`.
        """
        sums = (np.asarray([beam.logprob for beam in beams])[:, None] + logprobs).ravel()
        count = min((1 + len(self.end_ids)) * self.beams, len(sums))
        likely = np.flatnonzero(sums >= np.partition(sums, -count)[-count])
        ranked = likely[np.lexsort((likely, -sums[likely]))][:count]
        parents, tokens = np.divmod(ranked, logprobs.shape[1])
        return [
            Candidate((*beams[parent].token_ids, token), total, parent)
            for parent, token, total in zip(
                parents.tolist(), tokens.tolist(), sums[ranked].tolist(), strict=True
            )
        ]

    def best(self, finished: list[Candidate]) -> list[Candidate]:
        """Return the `beams` best finished sequences, best first. Ties go to the earlier one."""
        ranked = sorted(finished, key=lambda candidate: -candidate.score(self.length_penalty))
        return ranked[: self.beams]

    def done(self, finished: list[Candidate], beams: list[Candidate], max_tokens: int) -> bool:
        """Return whether no beam can change the result. `beams` are sorted, the best first."""
        if not beams:
            return True
        if len(finished) < self.beams:
            return False
        if self.early_stopping is True:
            return True
        tokens = len(beams[0].token_ids)
        if self.early_stopping == "never" and self.length_penalty > 0:
            tokens = max_tokens
        reachable = beams[0].score(self.length_penalty, tokens)
        return reachable <= finished[-1].score(self.length_penalty)


def beam_search(
    llm: LLM,
    prompts: PromptLike,
    *,
    beams: int = 4,
    max_tokens: int = 64,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
) -> list[RequestOutput]:
    """Return the `beams` best continuations of each prompt, the best first.

    The module docstring has the rules of the search.

    Args:
      llm: runs the sequences. Its sampling seed has no effect.
      prompts: as for `llm.generate`.
      beams: the number of sequences per round, and the maximum number that is returned.
      max_tokens: the maximum number of output tokens, also limited by `llm.max_model_len`.
      length_penalty: the power of the length that divides the sum of log-probabilities
        (`cumulative_logprob`) in the score. 0 ranks by the sum; larger values favour long
        sequences.
      early_stopping: False, True or "never": when to stop before `max_tokens`.
      stop_token_ids: end tokens besides those of the model.
      ignore_eos: whether to ignore the end tokens of the model.

    Returns:
      One output for each prompt, with up to `beams` continuations.

    Raises:
      ConfigError: an invalid prompt or option.
      CapacityError: the KV cache has no room for that many beams.

    Beams share the pages of their common prefix. A round is one dispatch if the beams fit the
    largest batch. All pages are freed at the end, and after an error.

    Example:
      >>> (output,) = jfp8kv.beam_search(llm, "The capital of France is", beams=4, max_tokens=8)
      >>> [continuation.text for continuation in output.outputs]
    """
    if not isinstance(llm, LLM):
        raise ConfigError(
            f"llm of type {type(llm).__name__}: must be an LLM; try beam_search(LLM(model), ...)."
        )
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids), ignore_eos=ignore_eos
    )
    params.check_vocab(llm.params.config.vocab)
    end_ids = set(params.stop_token_ids)
    if not ignore_eos:
        end_ids.update(llm.params.eos_ids)
    options = SearchOptions(beams, length_penalty, early_stopping, end_ids)
    encoded = [
        encode(prompt, llm.tokenizer, what=f"prompt {i}")
        for i, prompt in enumerate(as_list(prompts))
    ]
    return [
        _search_prompt(llm, prompt, max_tokens, options, f"prompt {i}")
        for i, prompt in enumerate(encoded)
    ]


def _search_prompt(
    llm: LLM, prompt: Encoded, max_tokens: int, options: SearchOptions, what: str
) -> RequestOutput:
    start = time.perf_counter()
    max_new_tokens = llm.max_model_len - len(prompt.ids)
    if max_new_tokens < 1:
        raise CapacityError(
            f"{what} has {len(prompt.ids)} tokens: max_model_len={llm.max_model_len} leaves no "
            "room for output."
        )
    sessions: list[Session] = []
    try:
        best = _search(llm, prompt.ids, min(max_tokens, max_new_tokens), options, sessions)
    except CapacityError as error:
        raise CapacityError(
            f"beams={options.beams} for {what}: {error} Or try fewer beams."
        ) from error
    finally:
        for session in sessions:
            session.close()
    return RequestOutput(
        prompt=prompt.text,
        prompt_token_ids=prompt.ids,
        outputs=[_output(llm, prompt, each, index, options) for index, each in enumerate(best)],
        total_s=time.perf_counter() - start,
    )


def _search(
    llm: LLM, ids: list[int], max_tokens: int, options: SearchOptions, sessions: list[Session]
) -> list[Candidate]:
    """Return the best continuations of a prompt.

    `sessions` is an empty list. It receives the open sessions, one for each beam, so that the
    caller can close them after an error.
    """
    sessions.append(llm.session(ids))
    sessions[0].rollback(1)
    logits = extend_batch(sessions, ids[-1:])
    beams = [Candidate((), 0.0)]
    finished: list[Candidate] = []
    for tokens in range(1, max_tokens + 1):
        unfinished = []
        for rank, candidate in enumerate(options.expand(beams, _log_softmax(logits))):
            if candidate.token_ids[-1] not in options.end_ids and tokens < max_tokens:
                unfinished.append(candidate)
            elif rank < options.beams:
                finished.append(candidate)
        beams = unfinished[: options.beams]
        finished = options.best(finished)
        if options.done(finished, beams, max_tokens):
            break
        _fork_sessions(sessions, [beam.parent for beam in beams])
        logits = extend_batch(sessions, [beam.token_ids[-1] for beam in beams])
    return finished


def _fork_sessions(sessions: list[Session], parents: list[int]) -> None:
    """Replace `sessions` by one for each of `parents`, in this order.

    The first child of a session reuses it, and others fork it. Sessions without children are
    closed.
    """
    before = list(sessions)
    children = []
    for index, parent in enumerate(parents):
        first = parent not in parents[:index]
        child = before[parent] if first else before[parent].fork()
        children.append(child)
        sessions.append(child)
    for index, session in enumerate(before):
        if index not in parents:
            session.close()
    sessions[:] = children


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _output(
    llm: LLM, prompt: Encoded, candidate: Candidate, index: int, options: SearchOptions
) -> CompletionOutput:
    """Return a finished sequence as an output of `generate`: its text excludes the end token."""
    ids = list(candidate.token_ids)
    ended = ids[-1] in options.end_ids
    text = ""
    if llm.tokenizer is not None:
        detokenizer = Detokenizer(llm.tokenizer, context=prompt.ids[-PROMPT_CONTEXT:])
        text = detokenizer.push(ids[:-1] if ended else ids) + detokenizer.finish()
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=ids,
        logprobs=None,
        finish_reason="stop" if ended else "length",
        stop_reason=ids[-1] if ended else None,
        cumulative_logprob=candidate.logprob,
    )
