"""Beam search: the most likely continuations of a prompt, on top of `Session.fork` and
`extend_batch`.

Each round extends up to `beams` sequences, the *beams*, by one token. All continuations are
ranked by the sum of the log-probabilities of their output tokens, at temperature 1. Those among
the first `beams` that end, by an end token or at `max_tokens`, are *finished*; the first `beams`
of the others are the beams of the next round. A finished sequence has the score `sum / tokens **
length_penalty`, its end token included; the `beams` best of them are returned.

The search stops after `max_tokens`, when no beam is left, or when `beams` sequences are finished
and no beam can be among the best any more. `early_stopping` selects how that is judged: False
(the default) by the score the best beam would have if it ended now, "never" by the best score it
can reach within `max_tokens`, True not at all, so that the first `beams` finished sequences are
returned. These are the rules of Hugging Face's `generate(num_beams=)`. vLLM always runs
`max_tokens` rounds, and counts prompt tokens in the length.

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
from jfp8kv.engine.request import PROMPT_CONTEXT, CompletionOutput, RequestOutput
from jfp8kv.llm import LLM
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.session import Session, extend_batch
from jfp8kv.text.detokenizer import Detokenizer
from jfp8kv.text.prompts import Encoded, PromptLike, as_list, encode

EarlyStopping: TypeAlias = bool | Literal["never"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A beam, or a continuation of one.

    Attributes:
      token_ids: its output tokens.
      logprob: the sum of their log-probabilities.
      parent: the index of the beam it continues.
    """

    token_ids: tuple[int, ...]
    logprob: float
    parent: int = 0

    def score(self, length_penalty: float, tokens: int | None = None) -> float:
        """Return the log-probability, normalized by `tokens` or by the length."""
        return self.logprob / (tokens or len(self.token_ids)) ** length_penalty


@dataclasses.dataclass(frozen=True)
class Rules:
    """The options of a search. `end_ids`: the tokens that finish a sequence."""

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

        They are enough for `beams` of them not to end. Of equals the earlier beam comes first,
        then the smaller token id. `logprobs` is float64 `[beams, vocab]`.
        """
        sums = (np.asarray([beam.logprob for beam in beams])[:, None] + logprobs).ravel()
        count = min((1 + len(self.end_ids)) * self.beams, len(sums))
        found = np.flatnonzero(sums >= np.partition(sums, -count)[-count])
        ranked = found[np.lexsort((found, -sums[found]))][:count]
        parents, tokens = np.divmod(ranked, logprobs.shape[1])
        return [
            Candidate((*beams[parent].token_ids, token), total, parent)
            for parent, token, total in zip(
                parents.tolist(), tokens.tolist(), sums[ranked].tolist(), strict=True
            )
        ]

    def best(self, finished: list[Candidate]) -> list[Candidate]:
        """Return the best finished sequences, the best first; of equals the earlier."""
        ranked = sorted(finished, key=lambda candidate: -candidate.score(self.length_penalty))
        return ranked[: self.beams]

    def done(self, finished: list[Candidate], beams: list[Candidate], max_tokens: int) -> bool:
        """Return whether no beam can change the result. `beams` are ranked, the best first."""
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
      beams: sequences per round, and the most that are returned.
      max_tokens: the most tokens of a continuation, within `llm.max_model_len`.
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

    Beams share the pages of their common prefix, and a round is one dispatch if the engine's sizes
    allow. All pages are freed at the end, and after an error.

    Example:
      >>> (output,) = jfp8kv.beam_search(llm, "The capital of France is", beams=4, max_tokens=8)
      >>> [continuation.text for continuation in output.outputs]
    """
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids), ignore_eos=ignore_eos
    )
    params.check_vocab(llm.params.config.vocab)
    end_ids = set(params.stop_token_ids)
    if not ignore_eos:
        end_ids.update(llm.params.eos_ids)
    rules = Rules(beams, length_penalty, early_stopping, end_ids)
    encoded = [
        encode(prompt, llm.tokenizer, what=f"prompt {i}")
        for i, prompt in enumerate(as_list(prompts))
    ]
    return [
        _search_prompt(llm, prompt, max_tokens, rules, f"prompt {i}")
        for i, prompt in enumerate(encoded)
    ]


def _search_prompt(
    llm: LLM, prompt: Encoded, max_tokens: int, rules: Rules, what: str
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
        best = _search(llm, prompt.ids, min(max_tokens, max_new_tokens), rules, sessions)
    except CapacityError as error:
        raise CapacityError(
            f"beams={rules.beams} for {what}: {error} Or try fewer beams."
        ) from error
    finally:
        for session in sessions:
            session.close()
    return RequestOutput(
        prompt=prompt.text,
        prompt_token_ids=prompt.ids,
        outputs=[_output(llm, prompt, each, index, rules) for index, each in enumerate(best)],
        total_s=time.perf_counter() - start,
    )


def _search(
    llm: LLM, ids: list[int], max_tokens: int, rules: Rules, sessions: list[Session]
) -> list[Candidate]:
    """Return the best continuations of a prompt.

    `sessions` has the open sessions, one for each beam, also after an error.
    """
    sessions.append(llm.session(ids))
    sessions[0].rollback(1)
    logits = extend_batch(sessions, ids[-1:])
    beams = [Candidate((), 0.0)]
    finished: list[Candidate] = []
    for tokens in range(1, max_tokens + 1):
        unfinished = []
        for rank, candidate in enumerate(rules.expand(beams, _log_softmax(logits))):
            if candidate.token_ids[-1] not in rules.end_ids and tokens < max_tokens:
                unfinished.append(candidate)
            elif rank < rules.beams:
                finished.append(candidate)
        beams = unfinished[: rules.beams]
        finished = rules.best(finished)
        if rules.done(finished, beams, max_tokens):
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
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _output(
    llm: LLM, prompt: Encoded, candidate: Candidate, index: int, rules: Rules
) -> CompletionOutput:
    """Return a finished sequence as `generate` does: the end token is not part of the text."""
    ids = list(candidate.token_ids)
    ended = ids[-1] in rules.end_ids
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
