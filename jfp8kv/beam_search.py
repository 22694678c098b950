"""Beam search: several of the likeliest continuations of a prompt, as a function on top of `Session.fork` and `extend_batch`.

Each round has up to `beams` texts that go on, *beams*. All their continuations by one token are ranked by the sum of the
log-probabilities of the tokens made, the model's own, at temperature 1. Those among the first `beams` that end, by an end token
or because they have `max_tokens`, are *finished*; the first `beams` of the others are the beams of the next round. A finished
text has the score `sum / tokens ** length_penalty`, its end token counted; the best `beams` of them are kept, and returned.

The search is over after `max_tokens`, when no beam is left, or when `beams` texts are finished and no beam could still be among
the best. `early_stopping` says how that is judged: False (the usual one) by the score that the best beam would have if it ended
here, "never" by the best that it could come to with `max_tokens`, True not at all, so that the first `beams` to finish are what
is returned. These are the rules of Hugging Face's `generate(num_beams=)`; vLLM's differ in that all `max_tokens` rounds are run
and that the prompt's tokens count in the length.

Source: the search of Graves (2012, "Sequence transduction with recurrent neural networks", section 4), lengths normalized as by
Wu et al. (2016, arXiv:1609.08144, section 7), with a plain power of the length.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Sequence

import numpy as np

from jfp8kv.core.errors import CapacityError, ConfigError, invalid_choice
from jfp8kv.engine.request import PROMPT_CONTEXT, CompletionOutput, RequestOutput
from jfp8kv.llm import LLM
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.session import Session, extend_batch
from jfp8kv.text.detokenizer import Detokenizer
from jfp8kv.text.prompts import Encoded, PromptLike, as_list, encode


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A text that goes on, or a continuation of one: its tokens after the prompt, the sum of their log-probabilities, and which
    of the round's beams it continues."""

    token_ids: tuple[int, ...]
    logprob: float
    parent: int = 0

    def score(self, length_penalty: float, tokens: int | None = None) -> float:
        """The sum, normalized by the length that it has, or would have."""
        return self.logprob / (tokens or len(self.token_ids)) ** length_penalty


@dataclasses.dataclass(frozen=True)
class Rules:
    """What `beam_search` was asked for."""

    beams: int
    length_penalty: float
    early_stopping: bool | str
    ends: Collection[int]

    def __post_init__(self) -> None:
        if isinstance(self.beams, bool) or not isinstance(self.beams, int) or self.beams < 1:
            raise ConfigError(f"beams={self.beams!r}: must be an integer from 1 on.")
        if isinstance(self.length_penalty, bool) or not isinstance(
            self.length_penalty, int | float
        ):
            raise ConfigError(f"length_penalty={self.length_penalty!r}: must be a number.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty={self.length_penalty!r}: must be finite.")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise invalid_choice("early_stopping", self.early_stopping, ("True", "False", "never"))

    def likeliest(self, live: Sequence[Candidate], logprobs: np.ndarray) -> list[Candidate]:
        """The likeliest continuations of `live` by one token, best first, of equals those of earlier beams and smaller ids: so
        many that `beams` of them go on whatever the others end with. `logprobs` is float64 `[live, vocab]`."""
        sums = (np.asarray([beam.logprob for beam in live])[:, None] + logprobs).ravel()
        count = min((1 + len(self.ends)) * self.beams, len(sums))
        found = np.flatnonzero(sums >= np.partition(sums, -count)[-count])
        ranked = found[np.lexsort((found, -sums[found]))][:count]
        parents, tokens = np.divmod(ranked, logprobs.shape[1])
        return [
            Candidate((*live[parent].token_ids, token), total, parent)
            for parent, token, total in zip(
                parents.tolist(), tokens.tolist(), sums[ranked].tolist(), strict=True
            )
        ]

    def best(self, finished: list[Candidate]) -> list[Candidate]:
        """The best of finished texts, best first, of equals the earlier."""
        return sorted(finished, key=lambda text: -text.score(self.length_penalty))[: self.beams]

    def over(self, finished: list[Candidate], live: list[Candidate], max_tokens: int) -> bool:
        """Whether no beam, the best first, can still change what is returned."""
        if not live:
            return True
        if len(finished) < self.beams:
            return False
        if self.early_stopping is True:
            return True
        tokens = (
            max_tokens
            if self.early_stopping == "never" and self.length_penalty > 0
            else len(live[0].token_ids)
        )
        return live[0].score(self.length_penalty, tokens) <= finished[-1].score(self.length_penalty)


def beam_search(
    llm: LLM,
    prompts: PromptLike,
    *,
    beams: int = 4,
    max_tokens: int = 64,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
) -> list[RequestOutput]:
    """The `beams` best continuations of each prompt, best first, by beam search as the module says.

    Args:
      prompts: as for `llm.generate`.
      beams: texts that are followed at once, and most that are returned.
      max_tokens: most tokens of a continuation, as far as `llm.max_model_len` has room.
      length_penalty: the power of the length that divides a text's sum of log-probabilities (its `cumulative_logprob`) in its
        score: 0 ranks by the sum alone, larger ones favour long texts.
      early_stopping: False, True or "never": when to stop before `max_tokens`.
      stop_token_ids, ignore_eos: which tokens end a text: these, and the model's own unless they are ignored.

    Beams share the pages of what they have in common, and each round is one dispatch as far as the engine's sizes allow. What
    they hold is freed at the end and after an error: `ConfigError` for what cannot be asked for, `CapacityError` when the pool
    has no room for so many.
    """
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids), ignore_eos=ignore_eos
    )
    params.check_vocab(llm.params.config.vocab)
    ends = {*params.stop_token_ids, *(() if ignore_eos else llm.params.eos_ids)}
    rules = Rules(beams, length_penalty, early_stopping, ends)
    encoded = [
        encode(prompt, llm.tokenizer, what=f"prompt {i}")
        for i, prompt in enumerate(as_list(prompts))
    ]
    return [
        _of_prompt(llm, prompt, max_tokens, rules, f"prompt {i}")
        for i, prompt in enumerate(encoded)
    ]


def _of_prompt(
    llm: LLM, prompt: Encoded, max_tokens: int, rules: Rules, what: str
) -> RequestOutput:
    began = time.perf_counter()
    room = llm.max_model_len - len(prompt.ids)
    if room < 1:
        raise CapacityError(
            f"{what} has {len(prompt.ids)} tokens: max_model_len={llm.max_model_len} leaves room for none."
        )
    sessions: list[Session] = []
    try:
        found = _search(llm, prompt.ids, min(max_tokens, room), rules, sessions)
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
        outputs=[_output(llm, prompt, text, index, rules) for index, text in enumerate(found)],
        total_s=time.perf_counter() - began,
    )


def _search(
    llm: LLM, ids: list[int], max_tokens: int, rules: Rules, sessions: list[Session]
) -> list[Candidate]:
    """The best texts after a prompt. `sessions` are those that are open, one for each beam, whatever happens."""
    sessions.append(llm.session(ids))
    sessions[0].rollback(1)
    logits = extend_batch(sessions, ids[-1:])
    live, finished = [Candidate((), 0.0)], []
    for made in range(1, max_tokens + 1):
        going = []
        for rank, text in enumerate(rules.likeliest(live, _log_softmax(logits))):
            if text.token_ids[-1] not in rules.ends and made < max_tokens:
                going.append(text)
            elif rank < rules.beams:
                finished.append(text)
        live, finished = going[: rules.beams], rules.best(finished)
        if rules.over(finished, live, max_tokens):
            break
        _branch(sessions, [beam.parent for beam in live])
        logits = extend_batch(sessions, [beam.token_ids[-1] for beam in live])
    return finished


def _branch(sessions: list[Session], parents: list[int]) -> None:
    """One session for each of `parents`, in their order: the parent's own for its first child, forks for others. Those without
    a child are closed."""
    before, children = list(sessions), []
    for place, parent in enumerate(parents):
        child = before[parent] if parent not in parents[:place] else before[parent].fork()
        children.append(child)
        sessions.append(child)
    for index, session in enumerate(before):
        if index not in parents:
            session.close()
    sessions[:] = children


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _output(
    llm: LLM, prompt: Encoded, text: Candidate, index: int, rules: Rules
) -> CompletionOutput:
    """A finished text as `generate` would give it: its end token is among the ids and not in the text."""
    ids = list(text.token_ids)
    ended = ids[-1] in rules.ends
    shown = ""
    if llm.tokenizer is not None:
        detokenizer = Detokenizer(llm.tokenizer, context=prompt.ids[-PROMPT_CONTEXT:])
        shown = detokenizer.push(ids[:-1] if ended else ids) + detokenizer.finish()
    return CompletionOutput(
        index=index,
        text=shown,
        token_ids=ids,
        logprobs=None,
        finish_reason="stop" if ended else "length",
        stop_reason=ids[-1] if ended else None,
        cumulative_logprob=text.logprob,
    )
