"""`LLM`: a model with its KV cache and compiled steps, which stay warm between calls."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Unpack, cast, overload

import numpy as np

from jfp8kv.attention import dispatch
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.compilation_cache import use_compilation_cache
from jfp8kv.core.errors import ConfigError, Jfp8kvError
from jfp8kv.core.options import takes
from jfp8kv.engine import forward
from jfp8kv.engine.driver import EngineDriver, EngineIterator
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.keywords import EngineFields
from jfp8kv.engine.options import EngineOptions, KVDtype
from jfp8kv.engine.programs import CompileReport
from jfp8kv.engine.request import Request, RequestOutput
from jfp8kv.engine.scoring import Scored, ScoreRequest, logits_request, score_iter
from jfp8kv.engine.stats import Stats
from jfp8kv.engine.warmup import warmup_steps
from jfp8kv.models.params import Params
from jfp8kv.request_group import GenerateFields, RequestBuilder, RequestGroup
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.session import Session
from jfp8kv.text.chat import ChatOptions
from jfp8kv.text.keywords import ChatFields
from jfp8kv.text.prompts import (
    EncodedPair,
    Message,
    OnePrompt,
    Prompt,
    PromptLike,
    SeveralPrompts,
    TokenIds,
    as_list,
    encode,
    encode_pair,
    is_single,
    with_chat_options,
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
    every caller with a request in flight receives the error, and the engine serves the next call.

    Steps run in a separate thread. JAX's context managers are local to a thread, so settings such
    as `jax.default_matmul_precision` reach the engine through `jax.config.update` only.

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
        use_compilation_cache()
        params = as_params(model, dtype=given.dtype, strict=given.strict)
        engine = Engine(params, given)
        self._driver = EngineDriver(engine)
        self._stats = engine.stats
        self._requests = RequestBuilder(self._driver, seed=given.seed)

    @property
    def engine(self) -> Engine:
        """The engine, for inspection and experiments; its interface may change between versions.

        Only the engine thread runs steps: read from it between calls, and do not call its methods
        while other calls run. Raises `ConfigError` once the LLM is closed.
        """
        return self._driver.engine

    @property
    def params(self) -> Params:
        """The model's weights, config and tokenizer."""
        return self.engine.params

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self.engine.params.tokenizer

    @property
    def stats(self) -> Stats:
        """Counters and the state of the cache. A live view, which the engine thread updates."""
        return self._stats

    @property
    def kv_dtype(self) -> str:
        """The format of the cache, with the number of layers of each format where they differ."""
        return self.engine.cache_config.name

    @property
    def max_model_len(self) -> int:
        """The maximum number of tokens of a request, prompt and output."""
        return self.engine.max_model_len

    @property
    def attention(self) -> str:
        """The attention implementation in use, and why it was selected."""
        choice = self.engine.attention
        return f"{choice.name}: {choice.reason}"

    # -- lifetime ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the engine, and free its KV cache and its reference to the weights.

        Waits for the running step. Requests in flight end with a `ConfigError`, and every later
        call, on sessions too, raises one. Closing twice does nothing. An LLM without references is
        closed automatically.
        """
        self._driver.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warmup(self, *, structured: bool = False, branches: bool = False) -> None:
        """Compile all step programs, or read them from the compilation cache.

        Later calls of `generate`, `chat`, `stream`, `logits` and `score`, requests with
        `prompt_logprobs` and single sessions then compile nothing. A request with more than 64 end
        tokens, or more than 512 entries in `logit_bias`, still compiles a program.

        Args:
          structured: also compile the programs of structured output.
          branches: also compile those of `extend_batch` and `beam_search`.
        """
        for _ in self._driver.iterate(
            warmup_steps(self.engine, structured=structured, branches=branches)
        ):
            pass

    def compile_report(self) -> CompileReport:
        """Return the compiled step programs: shapes, compile times, memory. Prints as a table."""
        return self._driver.call(lambda engine: engine.programs.report())

    # -- generation --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptLike,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **fields: Unpack[GenerateFields],
    ) -> list[RequestOutput]:
        """Generate a continuation of each prompt.

        Args:
          prompts: a str, a list of str, a list of token id lists, or chat messages (a list of
            dicts, or a list of such lists).
          sampling_params: parameters for all prompts, or a list with one for each.
          progress: whether to show a progress bar; None shows one on a terminal for more than 8
            prompts.
          **fields: fields of `SamplingParams`, which override those of `sampling_params`, and of
            `ChatOptions`, for chat messages: `tools`, `chat_template_kwargs`, ...

        Returns:
          One output for each prompt, in the order of `prompts`.

        Raises:
          ConfigError: an invalid prompt or parameter. All are checked before anything runs.
          CapacityError: a prompt that exceeds `max_model_len` or the KV cache.
          StepError, DeviceMemoryError: a step failed; the engine is usable again.

        Example:
          >>> outputs = llm.generate(["Once upon a time"], max_tokens=32, temperature=0.7)
          >>> outputs[0].text
        """
        groups = self._requests.build(as_list(prompts), sampling_params, fields)
        self._run([request for group in groups for request in group.requests], progress)
        return [group.output() for group in groups]

    def check(
        self,
        prompts: PromptLike,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **fields: Unpack[GenerateFields],
    ) -> None:
        """Raise the error that `generate` would raise for these arguments, and run nothing."""
        self._requests.encode(as_list(prompts), sampling_params, fields)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **fields: Unpack[GenerateFields],
    ) -> list[RequestOutput]:
        """Generate a reply to one conversation, or to each of several.

        Args:
          messages: one conversation, or a list of conversations. A message is a dict with the keys
            "role" and "content".
          sampling_params, progress: as for `generate`.
          **fields: fields of `SamplingParams` and `ChatOptions`, such as `tools=[get_weather]`.

        Returns one output for each conversation. Raises the errors of `generate`, and `ConfigError`
        for a model without a chat template.

        Example:
          >>> (reply,) = llm.chat([{"role": "user", "content": "Name a colour."}], max_tokens=8)
          >>> reply.text
        """
        if isinstance(messages, str) or any(isinstance(m, str) for m in messages):
            raise ConfigError(
                'chat takes messages such as [{"role": "user", "content": "..."}]; '
                "give plain text to generate."
            )
        return self.generate(messages, sampling_params, progress=progress, **fields)

    def generate_iter(
        self, requests: Iterable[tuple[Prompt, SamplingParams | Mapping[str, object] | None]]
    ) -> Iterator[tuple[int, RequestOutput | Jfp8kvError]]:
        """Generate continuations of prompts from an iterator, which may be endless.

        Args:
          requests: pairs of a prompt and its sampling parameters: a `SamplingParams`, a mapping of
            its fields, or None. A pair is taken only when the engine has room for it, so memory
            does not grow with their number.

        Yields:
          `(number, result)` of each request as soon as it finishes. Requests are counted from 0.
          The result of an invalid request, or of one in a failed step, is its error.

        Closing the iterator cancels the requests in flight.

        Example:
          >>> pairs = ((line, {"max_tokens": 8}) for line in open("prompts.txt"))
          >>> for number, output in llm.generate_iter(pairs): ...
        """

        def make_group(
            request: tuple[Prompt, SamplingParams | Mapping[str, object] | None],
        ) -> RequestGroup:
            prompt, params = request
            if isinstance(params, Mapping):
                (group,) = self._requests.build([prompt], None, cast(GenerateFields, params))
            else:
                (group,) = self._requests.build([prompt], params, {})
            return group

        limit = 2 * self.engine.buckets.max_requests
        return self._driver.run_iter(make_group, requests, limit=limit)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> EngineIterator[str]:
        """Generate one continuation and yield each new piece of its text immediately.

        Other calls share the engine meanwhile. Steps run only while a caller waits, so a stream
        that is not read costs nothing. Closing or dropping the iterator cancels the request.

        Args:
          prompt: a str, a list of token ids, or a conversation.
          sampling_params, **fields: as for `generate`, with `n` and `best_of` 1.

        Raises:
          ConfigError: an invalid argument, or a model without a tokenizer.
          CapacityError, StepError, DeviceMemoryError: as for `generate`.

        Example:
          >>> for piece in llm.stream("Once upon a time", max_tokens=64):
          ...     print(piece, end="", flush=True)
        """
        return self._driver.stream(self._requests.build_stream(prompt, sampling_params, fields))

    def astream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> AsyncIterator[str]:
        """Return an asynchronous `stream`. Nothing blocks the event loop.

        Cancelling the task, leaving the loop or `aclose()` cancels the request. Its pages are freed
        at the end of the running step. Arguments and errors are those of `stream`.

        Example:
          >>> async for piece in llm.astream("Once upon a time", max_tokens=64):
          ...     print(piece, end="", flush=True)
        """
        return self._driver.astream(self._requests.build_stream(prompt, sampling_params, fields))

    def session(self, prompt: Prompt, **chat_fields: Unpack[ChatFields]) -> Session:
        """Prefill a prompt and return it as a `Session`: a sequence that stays in the KV cache.

        Args:
          prompt: a str, a list of token ids, or a conversation.
          **chat_fields: fields of `ChatOptions`, for a conversation.

        Raises:
          ConfigError: an invalid prompt.
          CapacityError: a prompt that exceeds `max_model_len` or the free pages.

        Example:
          >>> with llm.session("Question: why is the sky blue?") as session:
          ...     answers = [session.fork().generate(max_tokens=32) for _ in range(4)]
        """
        chat = ChatOptions.from_fields(**chat_fields) if chat_fields else None
        (prompt,) = with_chat_options([prompt], chat)
        ids = encode(prompt, self.tokenizer, what="prompt").ids
        self.engine.check(ids, forward.PREFILL_ONLY, what="prompt", new_tokens=0)
        return Session.start(self._driver, ids, self.generate)

    def _run(self, requests: list[Request], progress: bool | None) -> None:
        from tqdm import tqdm

        disable: bool | None = not progress
        if progress is None and len(requests) > 8:
            disable = None  # tqdm then shows a bar if stderr is a terminal
        with tqdm(total=len(requests), unit="prompt", disable=disable) as bar:
            self._driver.run(requests, on_finish=bar.update)

    # -- scoring -----------------------------------------------------------------------------------

    def logits(self, token_ids: TokenIds) -> np.ndarray:
        """Return the logits after each token, float32 `[tokens, vocab]`.

        They are computed over the paged KV cache by the steps that `generate` runs.

        Args:
          token_ids: a sequence of token ids, such as a list or a 1-D integer array.

        Raises:
          ConfigError: an empty sequence, or an id outside the vocabulary.
          CapacityError: a sequence that exceeds `max_model_len` or the KV cache.

        Example:
          >>> llm.logits([1, 15, 7]).argmax(axis=-1)  # the most likely next token of each prefix
        """
        if isinstance(token_ids, str):
            raise ConfigError(
                f"token_ids={token_ids!r}: must be a list of token ids, not text; try "
                "llm.tokenizer.encode(text)."
            )
        ids = encode(token_ids, None, what="token_ids").ids
        self.engine.check(ids, forward.PREFILL_ONLY, what="token_ids", new_tokens=0)
        request = logits_request(ids)
        self._driver.run([request])
        assert request.prompt_outputs is not None
        (logits,) = request.prompt_outputs.arrays
        return logits

    @overload  # a str is a Sequence[str] too
    def score(self, prompts: OnePrompt) -> np.ndarray: ...  # type: ignore[overload-overlap]

    @overload
    def score(self, prompts: SeveralPrompts) -> list[np.ndarray]: ...

    @overload
    def score(self, prompts: PromptLike) -> np.ndarray | list[np.ndarray]: ...

    def score(self, prompts: PromptLike) -> np.ndarray | list[np.ndarray]:
        """Return the log-probability of each token but the first, given the tokens before it.

        Args:
          prompts: one prompt or several, as for `generate`. Several are batched.

        Returns:
          Float32 `[tokens - 1]` for one prompt, or a list of such arrays.

        Raises:
          ConfigError: an invalid prompt, or one of a single token. Nothing has run then.
          CapacityError: a prompt that exceeds `max_model_len` or the KV cache.

        Example:
          >>> perplexity = np.exp(-llm.score("The sky is blue.").mean())
        """
        listed = as_list(prompts)
        if not listed:
            raise ConfigError("prompts is empty: give at least one.")
        score_requests = [
            ScoreRequest.of(self.engine, encode_pair(prompt, None, self.tokenizer))
            for prompt in listed
        ]
        self._driver.run([request for score in score_requests for request in score.requests])
        logprobs = [score.logprobs() for score in score_requests]
        return logprobs[0] if is_single(prompts) else logprobs

    def score_iter(
        self, pairs: Iterable[tuple[Prompt, str | None]]
    ) -> Iterator[tuple[int, Scored | Jfp8kvError]]:
        """Score completions from an iterator, which may be endless.

        Args:
          pairs: prompts and their completions. With None as the completion, the prompt is scored.

        Yields:
          `(number, result)` of each pair, in the order they finish. Pairs are counted from 0. The
          result of a pair that cannot be scored is its error.

        Sequences of similar length are batched, and prompts that are in the prefix cache are not
        run again. Closing the iterator cancels the pairs in flight.

        Example:
          >>> for number, scored in llm.score_iter([("2 + 2 =", " 4"), ("2 + 2 =", " 5")]):
          ...     print(number, sum(scored.logprobs))
        """

        def encode_pairs() -> Iterator[EncodedPair | Jfp8kvError]:
            for prompt, completion in pairs:
                try:
                    yield encode_pair(prompt, completion, self.tokenizer)
                except Jfp8kvError as error:
                    yield error

        return score_iter(self._driver, encode_pairs())
