"""How likely given texts are, several of them in a dispatch."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from os.path import commonprefix
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine import step
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.forward import PREFILL_ONLY, prefill_only_request, prefill_sessions
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.text.prompts import encode
from jfp8kv.text.tokenizer import Tokenizer

WINDOW = 64  # texts that are looked at together, to find some of like length


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of a completion's tokens, each given all before it."""

    prompt_tokens: int
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, how many of them are the prompt's, and from which one on they are scored."""

    ids: list[int]
    prompt_tokens: int

    @property
    def first(self) -> int:
        return max(1, self.prompt_tokens)


def text_of(prompt: Any, completion: str | None, tokenizer: Tokenizer | None) -> Text:
    """What is scored: a completion after its prompt, or all of the prompt. Raises `ConfigError`.

    Tokens are those of the one text that the two are, as far as they are text: a token that has of both is the completion's.
    """
    if completion is None:
        return Text(encode(prompt, tokenizer, what="the prompt").ids, 0)
    if isinstance(prompt, str):
        ids = encode(prompt + completion, tokenizer, what="the text").ids
        assert tokenizer is not None  # or this had raised
        return Text(ids, len(commonprefix([tokenizer.encode(prompt), ids])))
    before = encode(prompt, tokenizer, what="the prompt").ids
    if tokenizer is None:
        raise ConfigError("the completion is text, and this model has no tokenizer.")
    return Text(before + tokenizer.encode(completion, add_special_tokens=False), len(before))


def score_iter(
    service: EngineDriver, asked: Iterable[tuple[Any, str | None]], tokenizer: Tokenizer | None
) -> Iterator[tuple[int, Scored | Exception]]:
    """`(number, result)` of each of `asked`, counted from 0: what it scored, or the error that it met."""
    coming = enumerate(asked)
    while window := list(itertools.islice(coming, WINDOW)):
        texts: dict[int, Text] = {}
        for number, (prompt, completion) in window:
            try:
                texts[number] = _checked(service.engine, text_of(prompt, completion, tokenizer))
            except Exception as error:
                yield number, error
        for group in _groups(service.engine, texts):
            yield from _results(service, {number: texts[number] for number in group})


def _checked(engine: Engine, text: Text) -> Text:
    if len(text.ids) <= text.first:
        raise ConfigError("there is no token to score: the first has none before it.")
    engine.check(text.ids, PREFILL_ONLY, what="the text", more=0)
    return text


def _groups(engine: Engine, texts: dict[int, Text]) -> Iterator[list[int]]:
    """Texts for a dispatch each, the longest first."""
    order = sorted(texts, key=lambda number: -len(texts[number].ids))
    while order:
        longest = len(texts[order[0]].ids)
        room = engine.num_pages // engine.requirements.total_pages(longest)
        most = max(1, min(room, engine.buckets.prefill_requests(engine.buckets.chunk(longest))))
        yield order[:most]
        order = order[most:]


def _results(
    service: EngineDriver, group: dict[int, Text]
) -> Iterator[tuple[int, Scored | Exception]]:
    """What came of a group. If it fails, each of it runs alone: one of them may be why."""
    try:
        found = _logprobs(service, list(group.values()))
    except Exception as error:
        if len(group) == 1:
            yield next(iter(group)), error
        else:
            for number, text in group.items():
                yield from _results(service, {number: text})
        return
    for (number, text), logprobs in zip(group.items(), found, strict=True):
        yield number, Scored(text.prompt_tokens, logprobs.tolist())


def _logprobs(service: EngineDriver, texts: list[Text]) -> list[np.ndarray]:
    """float32 `[tokens]` for each text, from its `first` on. What the cache has of what is before is not run."""
    engine = service.engine
    holdings = [
        SequenceHandle(engine.scheduler.kv_manager, prefill_only_request(text.ids))
        for text in texts
    ]
    found = {
        id(holding.request): np.empty(len(text.ids) + 1, np.float32)
        for holding, text in zip(holdings, texts, strict=True)
    }
    try:
        steps = prefill_sessions(
            engine, holdings, step.score, wanted=min(text.first for text in texts) - 1
        )
        for requests, positions, logits in service.each(steps):
            following = np.zeros(logits.shape[:2], np.int32)
            for row, request, at in zip(following, requests, positions, strict=False):
                ids = request.prompt_ids[at.start + 1 : at.stop + 1]
                row[: len(ids)] = ids
            for row, request, at in zip(
                np.asarray(_picked(logits, following)), requests, positions, strict=False
            ):
                found[id(request)][at.start + 1 : at.stop + 1] = row[: len(at)]
    finally:
        engine.dropped.extend(holdings)
        service.drop()
    return [
        found[id(holding.request)][text.first : -1]
        for holding, text in zip(holdings, texts, strict=True)
    ]


@jax.jit
def _picked(
    logits: Float32[Array, "requests tokens vocab"], following: Int32[Array, "requests tokens"]
) -> Float32[Array, "requests tokens"]:
    """The log-probability of the token that follows each."""
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
