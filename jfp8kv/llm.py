"""`LLM`: the engine as an object that stays warm."""

import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jfp8kv.attention import dispatch
from jfp8kv.checkpoint.load import load
from jfp8kv.core.errors import ConfigError, Jfp8kvError, unknown_keyword
from jfp8kv.core.formats import kv_format
from jfp8kv.core.platform import cache_folder
from jfp8kv.engine.compile_report import CompileReport
from jfp8kv.engine.detokenize import Detokenizer
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_dtype import is_name
from jfp8kv.engine.metrics import Stats
from jfp8kv.engine.prompts import Encoded, Message, as_list, encode
from jfp8kv.engine.request import CANCELLED, Request, RequestOutput
from jfp8kv.models.params import Params
from jfp8kv.models.tokenizer import Tokenizer
from jfp8kv.sampling.keys import request_key
from jfp8kv.sampling.params import MAX_SEED, SamplingParams
from jfp8kv.session import Session

CONTEXT = 4  # prompt tokens decoded before the first output token, so that a leading space survives


class LLM:
    """A model with its KV cache and compiled programs.

    Args:
      model: what `load` takes (a folder, a .gguf file, a hub id), or a `Params`.
      kv_cache_dtype: "auto" (the checkpoint's FP8 if it declares one, else the weights' type), "bfloat16", "float16",
        "float32", "fp8_e4m3" (or "fp8") or "fp8_e5m2". By layer: {"default": "fp8_e4m3", "skip": [0, "sliding_window"]}, whose
        skipped layers keep bfloat16 (or "skip_dtype"), a list of one name per layer, a `KVPlan` or a path to one.
      kv_scales: "auto" (the checkpoint's, else 1), "checkpoint", "unit", "token_head" (dynamic), a `KVScales` or a path to one.
      kv_cache_memory: bytes of cache ("2GiB", 500_000_000); None takes a share of what is free on the device (85% on an
        accelerator, 10% of a computer's memory), or less if `max_num_seqs` full contexts need less.
      max_model_len: most tokens of a request, prompt and output; None is what the model was trained for.
      max_num_seqs: most requests run at once; None is 64, or as many as leave prompts half of `max_num_batched_tokens`.
      dtype: of the weights when `model` is loaded here; None keeps the checkpoint's.
      strict: whether KV scales that are missing or broken are an error when `model` is loaded here; see `load`.
      seed: what requests without a seed of their own draw from, with their number.
      max_num_batched_tokens: most tokens of a turn, padding included: two of each of `max_num_seqs` requests that decode, the
        rest of prompts. It bounds for how long a prompt holds up others. None leaves 512 for prompts on a CPU, 2048 elsewhere.
      page_size: tokens per page.
      attention: "pallas" (GPU kernels), "xla" or "reference"; None picks the fastest that runs here. `llm.attention` says which
        runs and why.
      prefix_caching: whether texts that begin alike share what is cached of their beginning.

    Raises `ConfigError`, `CheckpointError`, or `NotSupported` for an attention that cannot run here. Threads may share it:
    whole calls take turns, streams take turns step by step.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Params,
        *,
        kv_cache_dtype: Any = "auto",
        kv_scales: Any = "auto",
        kv_cache_memory: int | str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        dtype: Any = None,
        strict: bool = True,
        seed: int = 0,
        max_num_batched_tokens: int | None = None,
        page_size: int = 64,
        attention: str | None = None,
        prefix_caching: bool = True,
        **unknown: Any,
    ):
        for name in unknown:
            meant = "kv_cache_dtype" if name == "kv_dtype" else None
            raise unknown_keyword(name, list(inspect.signature(LLM).parameters)[1:-1], meant=meant)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed={seed!r}: must be an integer from 0 to 2**64 - 1.")
        if isinstance(model, Params) and dtype is not None:
            raise ConfigError(
                f"dtype={dtype!r}: the Params given are {model.dtype.name} already; cast them, or load with dtype."
            )
        if isinstance(model, Params) and not strict:
            raise ConfigError(f"strict={strict!r}: the Params given are loaded already; load them with strict={strict!r}.")
        if is_name(kv_cache_dtype) and kv_cache_dtype != "auto":
            kv_format(kv_cache_dtype)  # refused now rather than after loading
        dispatch.choose(attention)
        keep_compiled_programs()
        self._engine = Engine(
            model if isinstance(model, Params) else load(model, dtype=dtype, strict=strict),
            kv_dtype=kv_cache_dtype,
            kv_scales=kv_scales,
            kv_cache_memory=kv_cache_memory,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            attention=attention,
            prefix_caching=prefix_caching,
        )
        self._seed = seed
        self._numbers = 0
        self._lock = threading.RLock()

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
        return self._engine.kv.name

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and output."""
        return self._engine.max_model_len

    @property
    def attention(self) -> str:
        """Which attention runs and why."""
        choice = self._engine.attention
        return f"{choice.name}: {choice.why}"

    def warmup(self) -> None:
        """Compile all step programs now (or read them from the compilation cache); later calls then compile nothing.

        Whatever they ask for, that is, but for a request with more than 64 tokens that end its text or more than 512 in
        `logit_bias`: the first one compiles a program of its own. So do sessions that first go on together (`extend_all`,
        `beam_search`), for each power of two of them and each width of what is added.
        """
        with self._lock:
            self._engine.warmup()

    def compile_report(self) -> CompileReport:
        """The step programs there are: what for, how long they took to compile, what memory they take. Prints as a table."""
        with self._lock:
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
        with self._lock:
            groups = self._requests(as_list(prompts), sampling_params, fields)
            for group in groups:
                if (wanted := group.requests[0].params.prompt_logprobs) is not None:
                    group.prompt_logprobs = self._prompt_logprobs(group.prompt.ids, wanted)
            self._run([r for group in groups for r in group.requests], progress)
            return [group.output() for group in groups]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        **rest: Any,
    ) -> list[RequestOutput]:
        """`generate` for chat messages `[{"role": "user", "content": "..."}]`, or a list of such conversations."""
        if isinstance(messages, str) or any(isinstance(m, str) for m in messages):
            raise ConfigError('chat takes messages such as [{"role": "user", "content": "..."}]; give plain text to generate.')
        return self.generate(messages, sampling_params, **rest)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None, **fields: Any) -> Iterator[str]:
        """The text of one continuation, piece by piece as it is made. Closing the iterator cancels the request.

        Other calls may run between two pieces: they share the engine.
        """
        with self._lock:
            (group,) = self._requests([prompt], sampling_params, fields)
        request = group.requests[0]
        if len(group.requests) != 1 or request.params.prompt_logprobs is not None:
            raise ConfigError("stream gives the text of one continuation: n must be 1, and prompt_logprobs None.")
        if request.detokenizer is None:
            raise ConfigError("stream gives text, and this model has no tokenizer: use generate, which also gives token ids.")
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        sent = 0
        try:
            with self._lock:
                self._engine.add(request)
            while True:
                with self._lock:
                    if request.finish_reason is None:
                        self._engine.step()
                    text, done = request.text, request.finish_reason
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)
                if done == CANCELLED:
                    raise Jfp8kvError("a step failed while this text was being made, and it was dropped: ask again.")
                if done:
                    return
        finally:
            with self._lock:
                self._engine.cancel([request])

    def session(self, prompt: Any) -> Session:
        """A text that stays in the cache, to be extended, taken back and branched: see `Session`."""
        with self._lock:
            ids = encode(prompt, self.tokenizer, what="prompt").ids
            self._engine.check(ids, SamplingParams(max_tokens=1), what="prompt", more=0)
            return Session.begin(self._engine, self._lock, ids, self.generate)

    def _run(self, requests: list[Request], progress: bool | None) -> None:
        from tqdm import tqdm

        hidden = not progress if progress is not None else (None if len(requests) > 8 else True)  # None: unless a terminal
        try:
            for request in requests:
                self._engine.add(request)
            with tqdm(total=len(requests), unit="prompt", disable=hidden) as bar:
                left = len(requests)
                while left:
                    self._engine.step()
                    before, left = left, sum(r.finish_reason is None for r in requests)
                    bar.update(before - left)
        finally:
            self._engine.cancel(requests)

    def _requests(self, prompts: list[Any], sampling: Any, fields: dict[str, Any]) -> list["_Group"]:
        """Every prompt encoded and checked, or an error; nothing is queued yet."""
        if not prompts:
            raise ConfigError("prompts is empty: give at least one.")
        each = list(sampling) if isinstance(sampling, list | tuple) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} sampling parameters for {len(prompts)} prompts: give one, or one for each.")
        groups = []
        for i, (prompt, base) in enumerate(zip(prompts, each, strict=True)):
            params = SamplingParams.from_fields(base, also=("progress",), **fields)
            encoded = encode(prompt, self.tokenizer, what=f"prompt {i}")
            self._engine.check(encoded.ids, params, what=f"prompt {i}")
            if params.stop and self.tokenizer is None:
                raise ConfigError("stop strings need text, and this model has no tokenizer: use stop_token_ids.")
            groups.append((encoded, params))
        return [self._group(encoded, params) for encoded, params in groups]

    def _group(self, prompt: Encoded, params: SamplingParams) -> "_Group":
        number, self._numbers = self._numbers, self._numbers + 1
        room = self._engine.max_model_len - len(prompt.ids)
        requests = [
            Request(
                prompt.ids,
                params,
                request_key(params.seed, index=index, engine_seed=self._seed, number=number),
                max_tokens=min(params.max_tokens, room),
                index=index,
                detokenizer=self.tokenizer and Detokenizer(self.tokenizer, params.stop, context=prompt.ids[-CONTEXT:]),
            )
            for index in range(params.n)
        ]
        return _Group(prompt, requests)

    # -- scoring --------------------------------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 `[tokens, vocab]`: the model's scores after each token, computed through the paged cache."""
        with self._lock:
            ids = encode(token_ids, None, what="token_ids").ids
            return np.concatenate(list(self._logits(ids, what="token_ids")))

    def score(self, text_or_token_ids: Any) -> np.ndarray:
        """float32 `[tokens - 1]`: log-probability of each token but the first, given those before it."""
        with self._lock:
            ids = encode(text_or_token_ids, self.tokenizer, what="text").ids
            found = [row[token] for row, token in zip(self._logprobs(ids, what="text"), ids[1:], strict=False)]
            return np.asarray(found, np.float32)

    def _prompt_logprobs(self, ids: list[int], count: int) -> list[dict[int, float] | None]:
        """For each prompt token but the first (None): its log-probability and those of the `count` likeliest ids."""
        found: list[dict[int, float] | None] = [None]
        for row, token in zip(self._logprobs(ids, what="prompt"), ids[1:], strict=False):
            likeliest = np.argpartition(-row, count)[:count] if count < len(row) else np.arange(len(row))
            ordered = sorted(likeliest.tolist(), key=lambda i, row=row: (-row[i], i))
            found.append({i: float(row[i]) for i in (*ordered, token)})
        return found

    def _logprobs(self, ids: list[int], *, what: str) -> Iterator[np.ndarray]:
        """The log-softmax of the logits after each token, float64 `[vocab]`."""
        for logits in self._logits(ids, what=what):
            for row in logits.astype(np.float64):
                peak = row.max()
                yield row - (peak + np.log(np.exp(row - peak).sum()))

    def _logits(self, ids: list[int], *, what: str) -> Iterator[np.ndarray]:
        self._engine.check(ids, SamplingParams(max_tokens=1), what=what, more=0)
        return self._engine.logits(ids)


class _Group:
    """A prompt and the requests made for its `n` continuations."""

    def __init__(self, prompt: Encoded, requests: list[Request]):
        self.prompt = prompt
        self.requests = requests
        self.prompt_logprobs: list[dict[int, float] | None] | None = None

    def output(self) -> RequestOutput:
        first = self.requests[0]
        began = [r.first_token for r in self.requests if r.first_token is not None]
        ended = [r.finished for r in self.requests if r.finished is not None]
        return RequestOutput(
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.ids,
            outputs=[r.output() for r in self.requests],
            prompt_logprobs=self.prompt_logprobs,
            first_token_s=min(began) - first.submitted if began else None,
            total_s=max(ended) - first.submitted if ended else None,
        )


def keep_compiled_programs() -> None:
    """Turn JAX's persistent compilation cache on, in the user's cache folder, unless the user has set one up already."""
    if jax.config.jax_compilation_cache_dir is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
