"""Sessions: sequences that stay in the KV cache, under the caller's control.

A session can be extended, rolled back and forked. Forks share pages copy-on-write, so a tree of
sequences costs the memory of its distinct tokens, and nothing is computed twice. Tree search and
in-context experiments are built on this.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, Unpack

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine import forward, step
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.request import CompletionOutput, Request, RequestOutput
from jfp8kv.sampling.keywords import SamplingFields
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.prompts import SupportsArray, TokenIds, encode

Tokens: TypeAlias = str | TokenIds
Generate: TypeAlias = Callable[..., list[RequestOutput]]


class Session:
    """A sequence that stays in the KV cache. Created by `llm.session(prompt)`.

    Its pages are freed by `close`, at the end of a `with` block, or when the session is garbage
    collected. No request can take them. Forks share them, and so do requests with the same prefix.

    Threads may share a session, whose calls are serialized, and may use several sessions of one
    `LLM` at the same time. `extend_batch` extends several sessions in one dispatch.

    Example:
      >>> with llm.session("Question: ") as session:
      ...     logits = session.extend("why is the sky blue?")  # [new tokens, vocab]
      ...     branch = session.fork()
      ...     answer = branch.generate(max_tokens=32)
    """

    def __init__(self, driver: EngineDriver, handle: SequenceHandle, generate: Generate):
        self._driver = driver
        self._sequence = handle
        self._generate = generate
        self._lock = threading.RLock()  # one call at a time; the engine serves others meanwhile
        self._free = weakref.finalize(self, driver.release, [handle])
        self._free.atexit = False

    @classmethod
    def start(cls, driver: EngineDriver, token_ids: list[int], generate: Generate) -> "Session":
        """Prefill `token_ids`, which the engine has checked, and return their session."""
        request = forward.prefill_only_request(token_ids)
        handle = SequenceHandle(driver.engine.scheduler.kv_manager, request)
        session = cls(driver, handle, generate)
        session._prefill()
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
        """The page numbers of the sequence, in the order of its tokens, for each layer group."""
        return [list(table.pages) for table in self._request.page_tables]

    def __len__(self) -> int:
        """The number of tokens so far."""
        return self._request.num_tokens

    def extend(self, tokens: Tokens) -> np.ndarray:
        """Append tokens and return the logits after each of them, float32 `[tokens, vocab]`.

        Args:
          tokens: a str, or a sequence of token ids.

        Raises:
          ConfigError: invalid tokens.
          CapacityError: too few free pages, or a sequence longer than `max_model_len`.

        The session is unchanged after an error.

        Example:
          >>> logits = session.extend(" The answer is")
          >>> next_token = int(logits[-1].argmax())
        """
        with _appended([self], [tokens]) as (first,):
            steps = forward.prefill_sessions(
                self._engine, [self._handle], step.logits, logits_from=first
            )
            rows = []
            for _, (positions,), logits in self._driver.iterate(steps):
                if positions.stop > first:
                    start = max(0, first - positions.start)
                    rows.append(np.asarray(logits)[0, start : len(positions)])
            return np.concatenate(rows)

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens` tokens.

        The remaining tokens stay cached. With a sliding window they are recomputed if pages in the
        window of the new end have been freed.

        Raises `ConfigError` if the session has fewer tokens.

        Example:
          >>> session.extend(" Paris")
          >>> session.rollback(1)
        """
        with self._lock:
            valid = isinstance(tokens, int) and not isinstance(tokens, bool)
            if not valid or not 0 <= tokens <= len(self):
                raise ConfigError(
                    f"rollback of {tokens!r} tokens: must be an integer from 0 to {len(self)}, the "
                    "length of the session."
                )
            self._truncate(len(self) - tokens)

    def fork(self) -> "Session":
        """Return a new session with the same tokens, which shares the pages (copy-on-write).

        Nothing is computed, and nothing is copied until one of the two is extended.

        Example:
          >>> branches = [session.fork() for _ in range(4)]
        """
        with self._lock:
            handle = self._handle
            return self._driver.call(
                lambda engine: Session(self._driver, handle.fork(), self._generate)
            )

    def generate(
        self, sampling_params: SamplingParams | None = None, **fields: Unpack[SamplingFields]
    ) -> CompletionOutput:
        """Generate one continuation, as `llm.generate` does, and append it to the session.

        Args:
          sampling_params, **fields: as for `llm.generate`, with `n=1` and without
            `prompt_logprobs`.

        Raises:
          ConfigError: an invalid parameter.
          CapacityError: no room for output.

        Example:
          >>> session.generate(max_tokens=32, temperature=0.0).text
        """
        with self._lock:
            params = SamplingParams.from_fields(sampling_params, **fields)
            if params.n != 1:
                raise ConfigError(
                    f"n={params.n}: a session has one continuation; use n=1, or fork() for several."
                )
            if params.prompt_logprobs is not None:
                raise ConfigError(
                    f"prompt_logprobs={params.prompt_logprobs}: a session returns none; try "
                    "llm.score(session.token_ids)."
                )
            (output,) = self._generate([self.token_ids], params)
            if output.token_ids:
                with _appended([self], [output.token_ids]):
                    self._prefill()
            return output.outputs[0]

    def close(self) -> None:
        """Free the pages. Later calls raise `ConfigError`. Closing twice does nothing."""
        with self._lock:
            self._free()
            self._driver.flush()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _engine(self) -> Engine:
        return self._driver.engine

    @property
    def _handle(self) -> SequenceHandle:
        if not self._free.alive:
            raise ConfigError("this session is closed: create another with llm.session(prompt).")
        return self._sequence

    @property
    def _request(self) -> Request:
        return self._handle.request

    def _encode(self, tokens: int | Tokens) -> list[int]:
        tokenizer = self._engine.params.tokenizer
        if not isinstance(tokens, str | int | np.integer | Sequence | SupportsArray):
            raise ConfigError(
                f"tokens={tokens!r}: must be a str, a token id or a list of token ids."
            )
        if isinstance(tokens, str) and tokenizer is not None:
            ids = tokenizer.encode(tokens, add_special_tokens=False)
        elif isinstance(tokens, int | np.integer):
            ids = encode([int(tokens)], tokenizer, what="tokens").ids
        else:
            ids = encode(tokens, tokenizer, what="tokens").ids
        if not ids:
            raise ConfigError("tokens is empty: at least one token is needed.")
        return ids

    def _truncate(self, tokens: int) -> None:
        """Truncate the sequence to `tokens` tokens."""
        handle = self._handle

        def truncate(engine: Engine) -> None:
            request = handle.request
            del request.prompt_ids[tokens:]
            del request.page_hashes[tokens // engine.requirements.page_size :]
            handle.kv_manager.truncate(request, tokens)

        self._driver.call(truncate)

    def _prefill(self) -> None:
        """Prefill the tokens that are not cached."""
        steps = forward.prefill_sessions(self._engine, [self._handle], step.prefill)
        for _ in self._driver.iterate(steps):
            pass


def extend_batch(sessions: Sequence[Session], tokens: Sequence[int | Tokens]) -> np.ndarray:
    """Extend each session by its tokens, in one dispatch if they fit the largest batch.

    Args:
      sessions: different sessions of one `LLM`.
      tokens: for each session a token id, a str or a sequence of token ids.

    Returns:
      The logits after the last token of each session, float32 `[sessions, vocab]`.

    Raises:
      ConfigError: the same session twice, sessions of several LLMs, or invalid tokens.
      CapacityError: too few free pages, or a sequence longer than `max_model_len`.

    All sessions are unchanged after an error.

    Example:
      >>> branches = [session, session.fork()]
      >>> logits = jfp8kv.extend_batch(branches, [" yes", " no"])
    """
    if not sessions or len(sessions) != len(tokens):
        raise ConfigError(
            f"{len(tokens)} tokens for {len(sessions)} sessions: give each session a token id, a "
            "str or a list of token ids."
        )
    distinct = len({id(session) for session in sessions}) == len(sessions)
    drivers = {id(session._driver) for session in sessions}
    if not distinct or len(drivers) > 1:
        raise ConfigError(
            "the same session twice, or sessions of several LLMs: give different sessions of one "
            "LLM; session.fork() creates them."
        )
    driver = sessions[0]._driver
    engine = driver.engine
    rows = {id(session._request): row for row, session in enumerate(sessions)}
    logits = np.empty((len(sessions), engine.params.config.vocab), np.float32)
    with _appended(sessions, tokens):
        handles = [session._handle for session in sessions]
        steps = forward.prefill_sessions(engine, handles, step.last_logits)
        for requests, _, last_logits in driver.iterate(steps):
            chosen = [rows[id(request)] for request in requests]
            logits[chosen] = np.asarray(last_logits)[: len(requests)]  # a later chunk overwrites
    return logits


@contextlib.contextmanager
def _appended(sessions: Sequence[Session], tokens: Sequence[int | Tokens]) -> Iterator[list[int]]:
    """Append tokens to sessions, and remove them again if the body raises.

    Yields the previous lengths. The sessions are locked in the body.
    """
    with contextlib.ExitStack() as locks:
        for session in sorted(sessions, key=id):  # one order for all threads: no deadlock
            locks.enter_context(session._lock)
        new_ids = [session._encode(new) for session, new in zip(sessions, tokens, strict=True)]
        for session, ids in zip(sessions, new_ids, strict=True):
            sequence = [*session._request.prompt_ids, *ids]
            session._engine.check(sequence, forward.PREFILL_ONLY, what="the sequence", new_tokens=0)
        lengths = [len(session) for session in sessions]
        try:
            for session, ids in zip(sessions, new_ids, strict=True):
                session._request.prompt_ids += ids
            yield lengths
        except BaseException:
            for session, length in zip(sessions, lengths, strict=True):
                session._truncate(length)
            raise
