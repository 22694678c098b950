"""From prompts to requests: check and encode prompts, create their requests, return the outputs."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.request import PromptOutputs, Request, RequestOutput
from jfp8kv.sampling.keywords import SamplingFields
from jfp8kv.sampling.params import (
    SamplingParams,
    params_by_prompt,
    special_stops,
    with_stop_tokens,
)
from jfp8kv.sampling.rng import request_key
from jfp8kv.text.chat import ChatOptions, split_fields
from jfp8kv.text.detokenizer import Detokenizer
from jfp8kv.text.keywords import ChatFields
from jfp8kv.text.prompts import Encoded, Prompt, encode, is_single, with_chat_options
from jfp8kv.text.tokenizer import Tokenizer

PROMPT_CONTEXT = 4  # prompt tokens detokenized before the first output token, for a leading space


class GenerateFields(SamplingFields, ChatFields, total=False):
    """Keywords of `generate`: fields of `SamplingParams` and of `ChatOptions`."""


@dataclasses.dataclass
class RequestGroup:
    """A prompt and its `n` requests, or `best_of` requests whose `n` best are returned."""

    prompt: Encoded
    params: SamplingParams
    requests: list[Request]

    @classmethod
    def of(
        cls,
        prompt: Encoded,
        params: SamplingParams,
        *,
        max_new_tokens: int,
        tokenizer: Tokenizer | None,
        engine_seed: int,
        number: int,
    ) -> "RequestGroup":
        """Create the requests of a prompt.

        Args:
          prompt: the encoded prompt.
          params: the sampling parameters of all its requests.
          max_new_tokens: the number of output tokens that the context length has room for.
          tokenizer: produces text and finds stop strings; None produces token ids only.
          engine_seed, number: determine the random keys if `params` has no seed.
        """
        requests = [
            Request(
                prompt.ids,
                params,
                request_key(params.seed, index=index, engine_seed=engine_seed, number=number),
                max_tokens=min(params.max_tokens, max_new_tokens),
                index=index,
                detokenizer=None if tokenizer is None else _detokenizer(tokenizer, prompt, params),
                special_stops=special_stops(params, tokenizer),
            )
            for index in range(params.best_of or params.n)
        ]
        if params.prompt_logprobs is not None:
            top = params.prompt_logprobs
            requests[0].prompt_outputs = PromptOutputs.logprobs(prompt.ids, top=top)
        return cls(prompt, params, requests)

    def output(self) -> RequestOutput:
        """Return the output of finished requests."""
        submitted = self.requests[0].submitted
        prompt_outputs = self.requests[0].prompt_outputs
        prompt_logprobs = None
        if prompt_outputs is not None:
            prompt_logprobs = prompt_outputs.top_logprobs(self.prompt.ids)
        first_tokens = [r.first_token for r in self.requests if r.first_token is not None]
        ends = [r.finished for r in self.requests if r.finished is not None]
        outputs = [
            dataclasses.replace(request.output(), index=index)
            for index, request in enumerate(self._best_requests())
        ]
        return RequestOutput(
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.ids,
            outputs=outputs,
            prompt_logprobs=prompt_logprobs,
            first_token_s=min(first_tokens) - submitted if first_tokens else None,
            total_s=max(ends) - submitted if ends else None,
        )

    def _best_requests(self) -> list[Request]:
        """Return the `n` requests whose outputs are returned.

        With `best_of` these are complete requests first, then those with the highest mean
        log-probability. Ties go to the earlier request.
        """
        if self.params.best_of is None:
            return self.requests
        ranked = sorted(self.requests, key=lambda r: (_complete(r), _mean_logprob(r)), reverse=True)
        return ranked[: self.params.n]


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """A tokenizer's `decode` with the options of a request."""

    tokenizer: Tokenizer
    params: SamplingParams

    def decode(self, ids: list[int], /) -> str:
        return self.tokenizer.decode(
            ids,
            skip_special_tokens=self.params.skip_special_tokens,
            spaces_between_special_tokens=self.params.spaces_between_special_tokens,
        )


def _detokenizer(tokenizer: Tokenizer, prompt: Encoded, params: SamplingParams) -> Detokenizer:
    return Detokenizer(
        _Decoder(tokenizer, params),
        params.stop,
        keep_stop=params.include_stop_str_in_output,
        context=prompt.ids[-PROMPT_CONTEXT:],
    )


def _complete(request: Request) -> bool:
    """Return whether a request finished normally. Truncated structured output did not."""
    if request.finish_reason == "length":
        return request.params.constraint is None
    return request.finish_reason == "stop"


def _mean_logprob(request: Request) -> float:
    logprobs = request.output_logprobs
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


class RequestBuilder:
    """Creates the requests of one engine from prompts and sampling parameters.

    Args:
      driver: the driver of the engine.
      seed: determines the random keys of requests without a seed, with the number of the prompt.
    """

    def __init__(self, driver: EngineDriver, *, seed: int):
        self._driver = driver
        self._seed = seed
        self._numbers = itertools.count()

    @property
    def _engine(self) -> Engine:
        return self._driver.engine

    def build_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None, fields: GenerateFields
    ) -> Request:
        """Check a prompt and create the request of its stream."""
        if not is_single(prompt):
            raise ConfigError(
                "a stream takes one prompt: give a str, a list of token ids or one conversation, "
                "or use generate for several."
            )
        (group,) = self.build([prompt], sampling_params, fields)
        if len(group.requests) != 1 or group.params.prompt_logprobs is not None:
            raise ConfigError(
                "a stream yields the text of one continuation: n and best_of must be 1, and "
                "prompt_logprobs None."
            )
        if self._engine.params.tokenizer is None:
            raise ConfigError(
                "a stream yields text, and this model has no tokenizer: use generate, which "
                "returns token ids."
            )
        return group.requests[0]

    def build(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        fields: GenerateFields,
    ) -> list[RequestGroup]:
        """Check all prompts and create their requests. Nothing is submitted."""
        return [
            RequestGroup.of(
                prompt,
                params,
                max_new_tokens=self._engine.max_model_len - len(prompt.ids),
                tokenizer=self._engine.params.tokenizer,
                engine_seed=self._seed,
                number=next(self._numbers),
            )
            for prompt, params in self.encode(prompts, sampling_params, fields)
        ]

    def encode(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        fields: GenerateFields,
    ) -> list[tuple[Encoded, SamplingParams]]:
        """Return the token ids and the sampling parameters of each prompt.

        Raises `ConfigError` or `CapacityError` for a request that the engine cannot run.
        """
        if not prompts:
            raise ConfigError("prompts is empty: give at least one.")
        engine = self._engine
        tokenizer = engine.params.tokenizer
        given = params_by_prompt(sampling_params, len(prompts))
        chat, sampling = split_fields(fields)
        encoded_prompts = []
        for index, (prompt, base) in enumerate(
            zip(with_chat_options(prompts, chat), given, strict=True)
        ):
            what = f"prompt {index}"
            params = SamplingParams.from_fields(
                base, also=("progress", *ChatOptions.names()), **sampling
            )
            params = with_stop_tokens(params, tokenizer, engine.params.config.vocab)
            encoded = encode(prompt, tokenizer, what=what)
            engine.check(encoded.ids, params, what=what)
            if params.stop and tokenizer is None:
                raise ConfigError(
                    f"stop={list(params.stop)!r}: stop strings need text, and this model has no "
                    "tokenizer; use stop_token_ids."
                )
            encoded_prompts.append((encoded, params))
        return encoded_prompts
