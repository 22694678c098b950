"""OpenAI's batch format: requests for `/v1/chat/completions` and `/v1/completions`, and responses.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_...", "custom_id": "a",
     "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A request that is not supported gets the response of the API: status 400 and the reason. A failure
of the engine has status 500. A line that is not a request has no response, and an `error`. A file
with an empty or repeated `custom_id` is refused as a whole, because its responses could not be
matched to the requests. Source: OpenAI's API reference, Batch (request input object, request output
object), Chat and Completions.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from jfp8kv.batch.config import Config
from jfp8kv.batch.requests import RowRequest, RowResult, row_seed
from jfp8kv.core.errors import ConfigError, did_you_mean
from jfp8kv.text.chat import ChatOptions, normalize_messages
from jfp8kv.text.prompts import ChatPrompt, Prompt
from jfp8kv.text.rows import OPENAI_KEYS, Fields, Reader, Row, RowError

if TYPE_CHECKING:
    from jfp8kv.engine.request import CompletionOutput, RequestOutput
    from jfp8kv.engine.scoring import Scored

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
# Keys of a body with the name and the meaning of a field of `SamplingParams`.
OPENAI_SAMPLING = {
    "temperature",
    "top_p",
    "n",
    "best_of",
    "stop",
    "seed",
    "max_tokens",
    "presence_penalty",
    "frequency_penalty",
}
VLLM_SAMPLING = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
}
SAMPLING_KEYS = frozenset(OPENAI_SAMPLING | VLLM_SAMPLING)
CONVERTED_KEYS = {"logprobs", "logit_bias", "response_format"}
# Keys with the name and the meaning of a field of `ChatOptions`: `tools` is OpenAI's, the others
# are vLLM's.
CHAT_OPTIONS = frozenset(ChatOptions.names())
CHAT_KEYS = {"messages", "max_completion_tokens", "top_logprobs", *CHAT_OPTIONS}
# Keys that are accepted and have no effect: accounting, caching and streaming.
IGNORED_KEYS = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "parallel_tool_calls",
}
# Values with which an unsupported key has no effect.
NO_EFFECT_VALUES: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "echo": (False,),
}
CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")
REPLACEMENT = "\ufffd"  # in the text of a token that is a part of a character
UNLIMITED_TOKENS = 2**31 - 1  # the context length is the limit
DEFAULT_COMPLETION_TOKENS = 16


def check_custom_ids(reader: Reader) -> None:
    """Raise `ConfigError` if a `custom_id` of the file is empty or repeated, naming the lines.

    Lines that are not requests are skipped here; they get an `error` in the output.
    """
    lines: dict[str, int] = {}
    with closing(iter(reader)) as rows:
        for row in rows:
            try:
                custom_id = row.fields().get("custom_id", 0)
            except RowError:
                continue
            if custom_id is None or (isinstance(custom_id, str) and not custom_id.strip()):
                raise ConfigError(
                    f"{reader.path}:{row.line}: custom_id is empty: give each request an id."
                )
            if not isinstance(custom_id, str):  # missing, or of another type
                continue
            first = lines.setdefault(custom_id, row.line)
            if first != row.line:
                raise ConfigError(
                    f"{reader.path}:{row.line}: custom_id {custom_id!r} is already used in line "
                    f"{first}: give each request of the file a different id."
                )


class OpenAIRequests:
    """Requests from OpenAI requests, and output rows in OpenAI's format.

    Args:
      config: the config of the run. Its sampling options are the defaults of a body.
      token_text: returns the text of a token id, for log-probabilities.
      created: the start of the run, in Unix seconds.
    """

    def __init__(self, config: Config, token_text: Callable[[int], str], created: int):
        self._config = config
        self._defaults = config.sampling.given()
        self._token_text = token_text
        self._created = created

    def request(self, row: Row, fields: Fields) -> RowRequest:
        """Return the request of a row. Raises `RowError` for one that is not supported."""
        missing = sorted(OPENAI_KEYS - fields.keys())
        if missing:
            raise RowError(
                f"has no {missing[0]!r}: a batch request has custom_id, method, url and body."
            )
        url = fields["url"]
        body = fields["body"]
        if not isinstance(fields["custom_id"], str):
            raise RowError(f"custom_id is {fields['custom_id']!r}: must be a string.")
        if fields["method"] != "POST" or url not in (CHAT_URL, COMPLETIONS_URL):
            raise RowError(
                f"{fields['method']} {url}: must be POST {CHAT_URL} or POST {COMPLETIONS_URL}."
            )
        if not isinstance(body, Mapping):
            raise RowError("body: must be an object.")
        chat = url == CHAT_URL
        defaults = {
            "max_tokens": UNLIMITED_TOKENS if chat else DEFAULT_COMPLETION_TOKENS,
            "seed": row_seed(self._config.seed, row.number),
        }
        return RowRequest(
            prompt=self._chat_prompt(body) if chat else _prompt(body),
            sampling=defaults | self._defaults | _sampling(body, chat),
        )

    def _chat_prompt(self, body: Mapping[str, Any]) -> Prompt:
        """Return the conversation of a body. Raises `RowError` for an invalid one."""
        given = self._config.chat.given()
        given |= {name: body[name] for name in CHAT_OPTIONS if body.get(name) is not None}
        if body.get("tool_choice") == "none" or not given.get("tools"):
            given.pop("tools", None)
        try:
            messages = _messages(body)
            options = ChatOptions(**given)
        except RowError:
            raise
        except ConfigError as error:
            raise RowError(f"body.{error}") from None
        _check_tools(body.get("tools") or ())
        return ChatPrompt(messages, options) if given else messages

    def result(self, row: Row, fields: Fields, result: "RequestOutput | Scored") -> RowResult:
        """Return the response to a request."""
        output = cast("RequestOutput", result)
        chat = fields["url"] == CHAT_URL
        if chat:
            sampling = self._defaults | _sampling(fields["body"], chat)
            top = sampling.get("logprobs") or 0
            choices = [self._chat_choice(completion, top) for completion in output.outputs]
        else:
            choices = [self._text_choice(completion) for completion in output.outputs]
        prompt_tokens = len(output.prompt_token_ids)
        completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._id(row)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": self._config.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
        line = self._line(row, fields["custom_id"], response=self._response(row, 200, body))
        return RowResult(line, prompt_tokens, completion_tokens)

    def failure(
        self, row: Row, fields: Fields | None, message: str, *, engine_error: bool = False
    ) -> RowResult:
        """Return the response to a failed request, or the error of a line that is not one."""
        message = f"line {row.line}: {message}"
        if fields is None or not isinstance(fields.get("custom_id"), str):
            error = {"code": "invalid_request", "message": message}
            return RowResult(self._line(row, None, error=error), ok=False)
        kind = "server_error" if engine_error else "invalid_request_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        response = self._response(row, 500 if engine_error else 400, body)
        return RowResult(self._line(row, fields["custom_id"], response=response), ok=False)

    def _line(
        self,
        row: Row,
        custom_id: str | None,
        *,
        response: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "id": f"batch_req_{self._id(row)}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }

    def _response(self, row: Row, status: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"status_code": status, "request_id": f"req_{self._id(row)}", "body": body}

    def _id(self, row: Row) -> str:
        """Return an id that depends on the model, the seed and the row only."""
        key = f"{self._config.model} {self._config.seed} {row.number}"
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def _chat_choice(self, completion: "CompletionOutput", top: int) -> dict[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            steps = zip(completion.token_ids, completion.logprobs, strict=True)
            content = [
                self._chat_token(token, step[token])
                | {
                    "top_logprobs": [
                        self._chat_token(other, logprob)
                        for other, logprob in itertools.islice(step.items(), top)
                    ]
                }
                for token, step in steps
            ]
            logprobs = {"content": content, "refusal": None}
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": _finish_reason(completion),
        }

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        utf8 = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": utf8}

    def _text_choice(self, completion: "CompletionOutput") -> dict[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            steps = list(zip(completion.token_ids, completion.logprobs, strict=True))
            tokens = [self._token_text(token) for token, _ in steps]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [step[token] for token, step in steps],
                "top_logprobs": [
                    {self._token_text(other): logprob for other, logprob in step.items()}
                    for _, step in steps
                ],
                "text_offset": list(itertools.accumulate(map(len, tokens), initial=0))[:-1],
            }
        return {
            "index": completion.index,
            "text": completion.text,
            "finish_reason": _finish_reason(completion),
            "logprobs": logprobs,
        }


def _finish_reason(completion: "CompletionOutput") -> str:
    """Return the finish reason in the API's terms; an incomplete output has "length"."""
    return "stop" if completion.finish_reason == "stop" else "length"


def _check_tools(tools: Sequence[Any]) -> None:
    for number, tool in enumerate(tools):
        match tool:
            case {"type": "function", "function": {"name": str()}}:
                pass
            case _:
                raise RowError(f"body.tools[{number}]: must be a function with a name.")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation, with the arguments of tool calls as objects.

    The API has them as JSON text, and chat templates expect objects.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("body.messages: must be a list of messages.")
    normalized = normalize_messages(messages)
    for number, message in enumerate(normalized):
        if "tool_calls" in message:
            where = f"body.messages[{number}].tool_calls"
            message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return normalized


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RowError(f"{where}: must be a list of tool calls.")
    parsed = []
    for number, call in enumerate(calls):
        match call:
            case {"function": {"name": str(), "arguments": arguments} as function}:
                name = f"{where}[{number}].function.arguments"
                function = {**function, "arguments": _arguments(arguments, name)}
            case {"function": {"name": str()} as function}:
                function = {**function, "arguments": {}}
            case _:
                raise RowError(f"{where}[{number}]: must have a function with a name.")
        parsed.append({**call, "function": function})
    return parsed


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Return the arguments of a tool call as an object. An empty text has no arguments."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where} is not valid JSON: {error}.") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise RowError(f"{where} is {arguments!r}: must be a JSON object.")
    return arguments


def _prompt(body: Mapping[str, Any]) -> Any:
    """Return the prompt: a string, token ids, or the one prompt in a list."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
        if len(prompt) != 1:
            raise RowError(f"body.prompt is a list of {len(prompt)}: put each prompt on a line.")
        return prompt[0]
    return prompt


def _sampling(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Return the fields of `SamplingParams` in a body. Raises `RowError` for an unsupported key."""
    known = SAMPLING_KEYS | CONVERTED_KEYS | IGNORED_KEYS | (CHAT_KEYS if chat else {"prompt"})
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in known and value not in NO_EFFECT_VALUES.get(name, ()):
            raise RowError(f"body.{name} is not supported.{did_you_mean(name, known)}")
    fields = {name: given[name] for name in SAMPLING_KEYS & given.keys()}
    if chat and "max_completion_tokens" in given:
        fields["max_tokens"] = given["max_completion_tokens"]
    if "logit_bias" in given:
        fields["logit_bias"] = _logit_bias(given["logit_bias"])
    seed = given.get("seed")
    if isinstance(seed, int) and seed < 0:
        fields["seed"] = seed % 2**64  # the API's seeds are signed
    if "response_format" in given:
        fields |= dict.fromkeys(CONSTRAINTS) | _constraint(given["response_format"])
    if "logprobs" in given:
        fields["logprobs"] = _logprobs(given, chat)
    if chat and given.get("top_logprobs") and not given.get("logprobs"):
        raise RowError("body.top_logprobs needs logprobs: true.")
    return fields


def _logprobs(given: Mapping[str, Any], chat: bool) -> Any:
    """Return the number of top log-probabilities to return; None for no log-probabilities."""
    logprobs = given["logprobs"]
    if logprobs is False:
        return None
    if not chat:
        return logprobs
    if logprobs is not True:
        raise RowError(f"body.logprobs is {logprobs!r}: must be true or false.")
    return given.get("top_logprobs", 0)


def _constraint(response_format: Any) -> dict[str, Any]:
    """Return the structured output options of `response_format`."""
    match response_format:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json_schema": schema}
    raise RowError(
        f"body.response_format is {response_format!r}: must be of type text, json_object, or "
        "json_schema with a schema."
    )


def _logit_bias(given: Any) -> dict[int, Any]:
    try:
        return {int(token): value for token, value in given.items()}
    except (AttributeError, ValueError):
        raise RowError(f"body.logit_bias is {given!r}: must map token ids to numbers.") from None
