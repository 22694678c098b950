"""`LLM`: the engine as an object that stays warm."""

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from jfp8kv.attention import dispatch
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.errors import ConfigError, Jfp8kvError
from jfp8kv.core.options import takes
from jfp8kv.core.platform import cache_folder
from jfp8kv.engine import forward
from jfp8kv.engine.driver import EngineDriver, raise_error
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.feed import feed
from jfp8kv.engine.group import OutputStream, RequestGroup
from jfp8kv.engine.keywords import EngineFields
from jfp8kv.engine.options import EngineOptions, KVDtype
from jfp8kv.engine.programs import CompileReport
from jfp8kv.engine.request import Request, RequestOutput
from jfp8kv.engine.scoring import (
    Scored,
    ScoreRequest,
    logits_request,
    score_iter,
)
from jfp8kv.engine.stats import Stats
from jfp8kv.engine.warmup import warmup
from jfp8kv.models.params import Params
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.session import Session
from jfp8kv.text.prompts import (
    Encoded,
    EncodedPair,
    Message,
    Prompt,
    PromptLike,
    TokenIds,
    as_list,
    encode,
    encode_pair,
    is_single,
)
from jfp8kv.text.tokenizer import Tokenizer


@takes(EngineOptions)
class LLM:
    """A model with its KV cache and compiled programs.

        llm = jfp8kv.LLM("path/or/hub-id", kv_dtype="fp8", kv_cache_memory="2GiB")
        llm.generate("Once upon a time", max_tokens=64)[0].text

    Args:
      model: a path or a hub id as for `load`, or a `Params`.
      kv_cache_dtype: alias of `kv_dtype`, the name of this option in vLLM.
      **options: the fields of `EngineOptions`, listed below.

    Threads and event loops may share an `LLM`. Their requests run in the same batches, and every
    step advances all of them. If a step fails (`StepError`, `DeviceMemoryError`) or is interrupted,
    every caller with a request in it receives the error, and the engine serves the next call.

    Raises:
      ConfigError: an invalid option, or one that does not fit the model.
      CheckpointError: a model that cannot be loaded.
      NotSupported: an attention implementation that cannot run on this device.
      DeviceMemoryError: no room for the KV cache.
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        kv_cache_dtype: KVDtype | None = None,
        **options: Unpack[EngineFields],
    ):
        if kv_cache_dtype is not None:
            kv_dtype = options.setdefault("kv_dtype", kv_cache_dtype)
            if kv_dtype != kv_cache_dtype:
                raise ConfigError(
                    f"kv_cache_dtype={kv_cache_dtype!r}: an alias of kv_dtype, which is given as "
                    f"{kv_dtype!r}; give one of them."
                )
        given = EngineOptions.from_fields(also=("model", "kv_cache_dtype"), **options)
        dispatch.select_backend(given.attention)  # an unsupported one is refused before loading
        keep_compiled_programs()
        params = as_params(model, dtype=given.dtype, strict=given.strict)
        self._engine = Engine(params, given)
        self._service = EngineDriver(self._engine)
        self._seed = given.seed
        self._numbers = itertools.count()

    @property
    def params(self) -> Params:
        """The model's weights, config and tokenizer."""
        return self._engine.params

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.params.tokenizer

    @property
    def stats(self) -> Stats:
        """Counters and the cache's state; a live view."""
        return self._engine.stats

    @property
    def kv_dtype(self) -> str:
        """The cache's format: what "auto" came to, with how many layers have which where they differ."""
        return self._engine.cache_config.name

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and output."""
        return self._engine.max_model_len

    @property
    def attention(self) -> str:
        """Which attention runs and why."""
        choice = self._engine.attention
        return f"{choice.name}: {choice.reason}"

    def warmup(self, *, structured: bool = False, branches: bool = False) -> None:
        """Compile all step programs now (or read them from the compilation cache); later calls then compile nothing.

        That is so for `generate`, `chat`, streams, `logits`, `score`, `prompt_logprobs` and whatever a single session does. Two
        kinds of calls have programs of their own, compiled here if asked for and else when first needed: `structured` those of
        json_schema, regex, choice and grammar, `branches` those of sessions that go on together (`extend_batch`, `beam_search`).
        A request with more than 64 tokens that end its text, or more than 512 in `logit_bias`, compiles one when it comes, and
        so do texts that `score_iter` takes together.
        """
        with self._service.turn() as engine:
            warmup(engine, structured=structured, branches=branches)

    def compile_report(self) -> CompileReport:
        """The step programs there are: what for, how long they took to compile, what memory they take. Prints as a table."""
        with self._service.turn():
            return self._engine.programs.report()

    # -- generating -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Continue each prompt; results in the order of `prompts`.

        Args:
          prompts: a str, a list of str, a list of token id lists, or chat messages (a list of dicts, or a list of those).
          sampling_params: for all prompts, or a list with one for each. `fields` override single fields of it.
          progress: show a bar; None shows one for more than 8 prompts on a terminal.

        Raises `ConfigError` for a prompt or parameter that cannot be served, naming it, before anything runs.
        """
        groups = self._groups(as_list(prompts), sampling_params, fields)
        self._run([r for group in groups for r in group.requests], progress)
        return [group.output() for group in groups]

    def check(
        self, prompts: Any, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> None:
        """Raise what `generate` would raise before anything runs."""
        self._checked(as_list(prompts), sampling_params, fields)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        **rest: Any,
    ) -> list[RequestOutput]:
        """`generate` for chat messages `[{"role": "user", "content": "..."}]`, or a list of such conversations."""
        if isinstance(messages, str) or any(isinstance(m, str) for m in messages):
            raise ConfigError(
                'chat takes messages such as [{"role": "user", "content": "..."}]; give plain text to generate.'
            )
        return self.generate(messages, sampling_params, **rest)

    def generate_iter(
        self, requests: Iterable[tuple[Any, SamplingParams | Mapping[str, Any] | None]]
    ) -> Iterator[tuple[int, RequestOutput | Exception]]:
        """Continue prompts from an iterator, which may be endless: `(number, result)` of each, as soon as it is made.

        Requests are pairs of a prompt and its sampling parameters (or a mapping of their fields), counted from 0. They are
        taken as the engine has room, so that it stays full and memory does not grow with their number. One that cannot be
        served gives its error as its result; a step that fails gives its error to all that were in it. Closing the iterator
        cancels what is in flight.
        """

        def group(asked: tuple[Any, Any]) -> RequestGroup:
            prompt, params = asked
            given = isinstance(params, Mapping)
            (group,) = self._groups(
                [prompt], None if given else params, dict(params) if given else {}
            )
            return group

        return feed(self._service, group, requests, 2 * self._engine.buckets.max_requests)

    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> Iterator[str]:
        """The text of one continuation, piece by piece as it is made. Closing the iterator cancels the request.

        Other calls may run meanwhile: they share the engine.
        """
        return self._stream(self._one(prompt, sampling_params, fields))

    def _stream(self, request: Request) -> Iterator[str]:
        with self._growing(request) as text:
            while not text.ended:
                self._service.advance(text.has_update)
                yield from text.deltas()

    def astream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> AsyncIterator[str]:
        """`stream` for `async for`. Steps run in a thread: the event loop never waits for one.

        Cancelling the task, leaving the loop or `aclose()` cancels the request: its pages are free at once, or when the step
        that is running ends.
        """
        return self._astream(self._one(prompt, sampling_params, fields))

    async def _astream(self, request: Request) -> AsyncIterator[str]:
        with self._growing(request) as text:
            while not text.ended:
                if not text.has_update():
                    await self._service.advance_async(text.has_update)
                for piece in text.deltas():
                    yield piece

    @contextlib.contextmanager
    def _growing(self, request: Request) -> Iterator[OutputStream]:
        """The text of a request, which runs meanwhile and is dropped if nobody waits for its end."""
        self._service.submit([request])
        try:
            yield OutputStream(request)
            raise_error([request])
        finally:
            self._service.drop([request])

    def _one(
        self, prompt: Any, sampling_params: SamplingParams | None, fields: dict[str, Any]
    ) -> Request:
        """The request of a stream."""
        (group,) = self._groups([prompt], sampling_params, fields)
        if len(group.requests) != 1 or group.params.prompt_logprobs is not None:
            raise ConfigError(
                "a stream gives the text of one continuation: n and best_of must be 1, and prompt_logprobs None."
            )
        if self.tokenizer is None:
            raise ConfigError(
                "a stream gives text, and this model has no tokenizer: use generate, which also gives token ids."
            )
        return group.requests[0]

    def session(self, prompt: Any) -> Session:
        """A text that stays in the cache, to be extended, taken back and branched: see `Session`."""
        ids = encode(prompt, self.tokenizer, what="prompt").ids
        self._engine.check(ids, forward.PREFILL_ONLY, what="prompt", more=0)
        return Session.begin(self._service, ids, self.generate)

    def _run(self, requests: list[Request], progress: bool | None) -> None:
        from tqdm import tqdm

        hidden = (
            not progress if progress is not None else (None if len(requests) > 8 else True)
        )  # None: unless a terminal
        with tqdm(total=len(requests), unit="prompt", disable=hidden) as bar:
            self._service.run(requests, ended=bar.update)

    def _groups(
        self, prompts: list[Any], sampling: Any, fields: dict[str, Any]
    ) -> list[RequestGroup]:
        """Requests for every prompt, or an error; nothing is queued yet."""
        return [
            RequestGroup.of(
                encoded,
                params,
                room=self._engine.max_model_len - len(encoded.ids),
                tokenizer=self.tokenizer,
                engine_seed=self._seed,
                number=next(self._numbers),
            )
            for encoded, params in self._checked(prompts, sampling, fields)
        ]

    def _checked(
        self, prompts: list[Any], sampling: Any, fields: dict[str, Any]
    ) -> list[tuple[Encoded, SamplingParams]]:
        """Every prompt encoded, with its parameters."""
        if not prompts:
            raise ConfigError("prompts is empty: give at least one.")
        each = list(sampling) if isinstance(sampling, list | tuple) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ConfigError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts: give one, or one for each."
            )
        asked = []
        for i, (prompt, base) in enumerate(zip(prompts, each, strict=True)):
            params = SamplingParams.from_fields(base, also=("progress",), **fields)
            encoded = encode(prompt, self.tokenizer, what=f"prompt {i}")
            self._engine.check(encoded.ids, params, what=f"prompt {i}")
            if params.stop and self.tokenizer is None:
                raise ConfigError(
                    "stop strings need text, and this model has no tokenizer: use stop_token_ids."
                )
            asked.append((encoded, params))
        return asked

    # -- scoring --------------------------------------------------------------------------------------------------------

    def logits(self, token_ids: TokenIds) -> np.ndarray:
        """Return the logits after each token, float32 `[tokens, vocab]`, through the paged cache."""
        ids = encode(token_ids, None, what="token_ids").ids
        self._engine.check(ids, forward.PREFILL_ONLY, what="token_ids", more=0)
        request = logits_request(ids)
        self._service.run([request])
        assert request.prompt_outputs is not None
        (logits,) = request.prompt_outputs.arrays
        return logits

    def score(self, prompts: PromptLike) -> np.ndarray | list[np.ndarray]:
        """Return the log-probability of each token but the first, given those before it.

        Args:
          prompts: one prompt or several, as for `generate`. All run together.

        Returns float32 `[tokens - 1]`, or a list of such arrays for a list of prompts. Raises
        `ConfigError` or `CapacityError` for a prompt that cannot be scored, before anything runs.
        """
        listed = as_list(prompts)
        if not listed:
            raise ConfigError("prompts is empty: give at least one.")
        scores = [
            ScoreRequest.of(self._engine, encode_pair(prompt, None, self.tokenizer))
            for prompt in listed
        ]
        self._service.run([request for score in scores for request in score.requests])
        found = [score.logprobs() for score in scores]
        return found[0] if is_single(prompts) else found

    def score_iter(
        self, pairs: Iterable[tuple[Prompt, str | None]]
    ) -> Iterator[tuple[int, Scored | Jfp8kvError]]:
        """Score completions from an iterator, which may be endless.

        Args:
          pairs: prompts and their completions. None scores the prompt.

        Yields `(number, result)`, counted from 0, in the order they finish. Sequences of similar
        length run together, and prompts that are in the prefix cache are not run again. A pair that
        cannot be scored yields its error. Closing the iterator cancels what is in flight.
        """

        def encoded() -> Iterator[EncodedPair | Jfp8kvError]:
            for prompt, completion in pairs:
                try:
                    yield encode_pair(prompt, completion, self.tokenizer)
                except Jfp8kvError as error:
                    yield error

        return score_iter(self._service, encoded())


def keep_compiled_programs() -> None:
    """Turn JAX's persistent compilation cache on, in the user's cache folder, unless the user has set one up already."""
    if (
        jax.config.jax_compilation_cache_dir is None
        and "JAX_COMPILATION_CACHE_DIR" not in os.environ
    ):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
