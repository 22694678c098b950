"""Texts that stay in the cache, to be extended, taken back and branched: state in the user's hands.

A functional cache makes branches cheap: what lies in a page never changes while others hold it, so a branch shares all pages of
its stem, and the last one, where both go on in their own way, is copied by whoever writes to it first. Nothing is run twice.
That is what tree search and experiments in context want.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine import forward, step
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.request import CompletionOutput, Request, RequestOutput
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.prompts import encode


class Session:
    """A text in the cache. Made by `llm.session(prompt)`; freed by `close`, at the end of a `with`, or when nothing refers to
    it.

    Its pages are its own to keep: no request takes them away. They are shared with its forks, and with whoever asks for a text
    that begins alike. Threads may share a session, whose calls take turns, and use those of one `LLM` at the same time;
    `extend_batch` takes several on in one dispatch.
    """

    def __init__(
        self,
        service: EngineDriver,
        holding: SequenceHandle,
        generate: Callable[..., list[RequestOutput]],
    ):
        self._service, self._engine, self._kept, self._generate = (
            service,
            service.engine,
            holding,
            generate,
        )
        self._lock = threading.RLock()  # one call at a time; the engine runs others meanwhile
        self._free = weakref.finalize(self, self._engine.dropped.append, holding)

    @classmethod
    def begin(
        cls,
        service: EngineDriver,
        token_ids: list[int],
        generate: Callable[..., list[RequestOutput]],
    ) -> "Session":
        """A session of these tokens, which the engine has checked."""
        session = cls(
            service,
            SequenceHandle(
                service.engine.scheduler.kv_manager, forward.prefill_only_request(token_ids)
            ),
            generate,
        )
        session._run(step.prefill)
        return session

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return list(self._request.prompt_ids)

    @property
    def text(self) -> str:
        """The text so far. Raises `ConfigError` for a model without a tokenizer."""
        tokenizer = self._engine.params.tokenizer
        if tokenizer is None:
            raise ConfigError("this model has no tokenizer: session.token_ids has the tokens.")
        return tokenizer.decode(self.token_ids)

    @property
    def pages(self) -> list[list[int]]:
        """The page numbers it holds, in the order of its tokens, by group of layers (one, where all layers are alike)."""
        return [list(held.pages) for held in self._request.page_tables]

    def __len__(self) -> int:
        """Tokens so far."""
        return self._request.num_tokens

    def extend(self, tokens: str | Sequence[int]) -> np.ndarray:
        """Go on with these tokens: float32 `[tokens, vocab]`, the logits after each of them."""
        with _longer([self], [tokens]) as (first,):
            rows = []
            steps = forward.prefill_sessions(
                self._engine, [self._holding], step.logits, logits_from=first
            )
            for _, (positions,), out in self._service.each(steps):
                if positions.stop > first:
                    rows.append(
                        np.asarray(out)[0, max(0, first - positions.start) : len(positions)]
                    )
            return np.concatenate(rows)

    def rollback(self, tokens: int) -> None:
        """Take the last so many tokens back. What is before them stays in the cache, unless a window has moved past it."""
        with self._lock:
            if (
                isinstance(tokens, bool)
                or not isinstance(tokens, int)
                or not 0 <= tokens <= len(self)
            ):
                raise ConfigError(
                    f"rollback of {tokens!r} tokens: must be an integer from 0 to {len(self)}, the tokens there are."
                )
            self._keep_first(len(self) - tokens)

    def fork(self) -> "Session":
        """Another session with the same text, sharing its pages. Nothing is run, nor copied before one of them goes on."""
        with self._lock, self._service.turn():
            return Session(self._service, self._holding.fork(), self._generate)

    def generate(
        self, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> CompletionOutput:
        """Go on with what the model makes of the text, as `llm.generate` would: one continuation, which joins the text."""
        with self._lock:
            params = SamplingParams.from_fields(sampling_params, **fields)
            if params.n != 1:
                raise ConfigError(
                    f"n={params.n}: a session goes on in one way; fork it for several."
                )
            if params.prompt_logprobs is not None:
                raise ConfigError(
                    f"prompt_logprobs={params.prompt_logprobs}: try llm.score(session.token_ids)."
                )
            (out,) = self._generate([self.token_ids], params)
            if out.token_ids:
                with _longer([self], [out.token_ids]):
                    self._run(step.prefill)
            return out.outputs[0]

    def close(self) -> None:
        """Free its pages; the session cannot be used any more. Closing twice does nothing."""
        with self._lock:
            self._free()
            self._service.drop()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _holding(self) -> SequenceHandle:
        if not self._free.alive:
            raise ConfigError("this session is closed: make another with llm.session(prompt).")
        return self._kept

    @property
    def _request(self) -> Request:
        return self._holding.request

    def _encoded(self, tokens: int | str | Sequence[int]) -> list[int]:
        tokenizer = self._engine.params.tokenizer
        if isinstance(tokens, str) and tokenizer is not None:
            ids = tokenizer.encode(tokens, add_special_tokens=False)
        else:
            ids = encode(
                [tokens] if isinstance(tokens, int | np.integer) else tokens,
                tokenizer,
                what="tokens",
            ).ids
        if not ids:
            raise ConfigError("tokens is empty: at least one token is needed.")
        return ids

    def _keep_first(self, tokens: int) -> None:
        """The text's first tokens alone."""
        request = self._request
        with self._service.turn():
            del request.prompt_ids[tokens:]
            del request.page_hashes[tokens // self._engine.requirements.page_size :]
            self._holding.kv_manager.truncate(request, tokens)

    def _run(self, function: Callable) -> None:
        """Run what is not in the cache."""
        for _ in self._service.each(
            forward.prefill_sessions(self._engine, [self._holding], function)
        ):
            pass


def extend_batch(
    sessions: Sequence[Session], tokens: Sequence[int | str | Sequence[int]]
) -> np.ndarray:
    """Go on with each session by tokens of its own (an id, a text or a list of ids), all in one dispatch as far as the engine's
    sizes allow: float32 `[sessions, vocab]`, the logits after the last token of each.

    All or none: after an error, such as `CapacityError` when memory is short, every text is as it was. Raises `ConfigError`
    unless they are different sessions of one `LLM`.
    """
    if not sessions or len(sessions) != len(tokens):
        raise ConfigError(
            f"{len(tokens)} tokens for {len(sessions)} sessions: give one id, text or list of ids for each."
        )
    if (
        len({id(session) for session in sessions}) < len(sessions)
        or len({id(session._engine) for session in sessions}) > 1
    ):
        raise ConfigError(
            "the same session twice, or sessions of several LLMs: give different sessions of one; fork makes them."
        )
    engine, rows = (
        sessions[0]._engine,
        {id(session._request): row for row, session in enumerate(sessions)},
    )
    logits = np.empty((len(sessions), engine.params.config.vocab), np.float32)
    with _longer(sessions, tokens):
        steps = forward.prefill_sessions(
            engine, [session._holding for session in sessions], step.last_logits
        )
        for requests, _, out in sessions[0]._service.each(steps):
            of_a_chunk = np.asarray(out)[: len(requests)]  # a later chunk's replace an earlier's
            logits[[rows[id(request)] for request in requests]] = of_a_chunk
    return logits


@contextlib.contextmanager
def _longer(sessions: Sequence[Session], tokens: Sequence[Any]) -> Iterator[list[int]]:
    """The sessions' texts with these tokens after them, from which position on; without them again if what is done fails."""
    with contextlib.ExitStack() as mine:
        for session in sorted(
            sessions, key=id
        ):  # in one order, whoever asks: nobody waits in a circle
            mine.enter_context(session._lock)
        added = [session._encoded(new) for session, new in zip(sessions, tokens, strict=True)]
        for session, ids in zip(sessions, added, strict=True):
            session._engine.check(
                [*session._request.prompt_ids, *ids], forward.PREFILL_ONLY, what="the text", more=0
            )
        lengths = [len(session) for session in sessions]
        for session, ids in zip(sessions, added, strict=True):
            session._request.prompt_ids += ids
        try:
            yield lengths
        except BaseException:
            for session, length in zip(sessions, lengths, strict=True):
                session._keep_first(length)
            raise
