"""A text that stays in the cache, to be extended, taken back and branched: state in the user's hands.

A functional cache makes branches cheap: whole pages never change, so a branch shares those of its stem and runs what lies past
them (at most a page of tokens) again when it first goes on. That is what tree search and experiments in context want.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine import step
from jfp8kv.engine.engine import Holding
from jfp8kv.engine.prompts import encode
from jfp8kv.engine.request import CompletionOutput, Request, RequestOutput
from jfp8kv.engine.service import Service
from jfp8kv.sampling.params import SamplingParams

FIRST_TOKENS = SamplingParams(max_tokens=1)  # of a text that is run, not sampled from


class Session:
    """A text in the cache. Made by `llm.session(prompt)`; freed by `close`, at the end of a `with`, or when nothing refers to
    it.

    Its pages are its own to keep: no request takes them away. They are shared with its forks, and with whoever asks for a text
    that begins alike. Threads may share a session, whose calls take turns, and use those of one `LLM` at the same time.
    """

    def __init__(self, service: Service, token_ids: list[int], generate: Callable[..., list[RequestOutput]]):
        engine = service.engine
        self._service, self._engine, self._generate = service, engine, generate
        self._lock = threading.RLock()  # one call at a time; the engine runs others meanwhile
        self._holding = Holding(engine.scheduler.paging, Request(token_ids, FIRST_TOKENS, np.zeros(2, np.uint32), max_tokens=1))
        self._free = weakref.finalize(self, engine.dropped.append, self._holding)
        self._run(step.prefill)

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
        return [list(held.pages) for held in self._request.held]

    def __len__(self) -> int:
        """Tokens so far."""
        return self._request.num_tokens

    def extend(self, tokens: str | Sequence[int]) -> np.ndarray:
        """Go on with these tokens: float32 `[tokens, vocab]`, the logits after each of them."""
        with self._lock:
            ids = self._encoded(tokens)
            if not ids:
                raise ConfigError("tokens is empty: at least one token is needed.")
            request = self._request
            self._engine.check([*request.prompt_ids, *ids], FIRST_TOKENS, what="the text", more=0)
            first = request.num_tokens
            request.prompt_ids += ids
            try:
                return self._run(step.score, wanted=first)
            except BaseException:
                self._keep_first(first)
                raise

    def rollback(self, tokens: int) -> None:
        """Take the last so many tokens back."""
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= len(self):
            raise ConfigError(f"rollback of {tokens!r} tokens: must be an integer from 0 to {len(self)}, the tokens there are.")
        with self._lock:
            self._keep_first(len(self) - tokens)

    def fork(self) -> "Session":
        """Another session with the same text, sharing its pages."""
        with self._lock:
            return Session(self._service, self.token_ids, self._generate)

    def generate(self, sampling_params: SamplingParams | None = None, **fields: Any) -> CompletionOutput:
        """Go on with what the model makes of the text, as `llm.generate` would: one continuation, which joins the text."""
        with self._lock:
            request = self._request
            params = SamplingParams.from_fields(sampling_params, **fields)
            if params.n != 1:
                raise ConfigError(f"n={params.n}: a session goes on in one way; fork it for several.")
            (out,) = self._generate([self.token_ids], params)
            request.prompt_ids += out.token_ids
            self._run(step.prefill)
            return out.outputs[0]

    def close(self) -> None:
        """Free its pages; the session cannot be used any more. Closing twice does nothing."""
        with self._lock:
            self._free()
            self._service.drop()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _request(self) -> Request:
        if not self._free.alive:
            raise ConfigError("this session is closed: make another with llm.session(prompt).")
        return self._holding.request

    def _encoded(self, tokens: str | Sequence[int]) -> list[int]:
        tokenizer = self._engine.params.tokenizer
        if isinstance(tokens, str) and tokenizer is not None:
            return tokenizer.encode(tokens, add_special_tokens=False)
        return encode(tokens, tokenizer, what="tokens").ids

    def _keep_first(self, tokens: int) -> None:
        """The text's first tokens alone. Whole pages are found again; a page that may be shared is not written to."""
        request = self._request
        with self._service.turn():
            del request.prompt_ids[tokens:]
            del request.keys[tokens // self._engine.needs.page_size :]
            self._holding.paging.release(request)
            request.begin_again()

    def _run(self, function: Callable, *, wanted: int | None = None) -> Any:
        """Run what is not in the cache; the logits after the tokens from `wanted` on, if asked for."""
        rows = []
        for positions, out in self._service.each(self._engine.catch_up(self._holding, function)):
            if wanted is not None and positions.stop > wanted:
                rows.append(np.asarray(out)[0, max(0, wanted - positions.start) : len(positions)])
        return np.concatenate(rows) if rows else None
