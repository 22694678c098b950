"""OpenAI's batch format, both ways: requests for `/v1/chat/completions` and `/v1/completions`, and a line for each answer.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A request that cannot be served as given gets the answer that the API would give, status 400 and why; one that failed in the
engine gets 500; a line that is no request has no response, and an `error`. Source: OpenAI's API reference, Batch (the request
input object, the request output object), Chat and Completions.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from jfp8kv.batch.config import Config
from jfp8kv.batch.inputs import OPENAI_KEYS, Row
from jfp8kv.batch.plain import Record, Request, row_seed
from jfp8kv.batch.templates import Fields, RowError
from jfp8kv.core.errors import did_you_mean

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What a body may ask of the sampler under the name that `SamplingParams` has for it; the second line is what vLLM adds.
SAMPLING = frozenset(
    (
        "temperature",
        "top_p",
        "n",
        "best_of",
        "stop",
        "seed",
        "max_tokens",
        "presence_penalty",
        "frequency_penalty",
    )
    + (
        "top_k",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
    )
)
# Taken, and without effect here: who asks and how it is billed, cached or streamed.
WITHOUT_EFFECT = frozenset(
    (
        "model",
        "user",
        "metadata",
        "store",
        "service_tier",
        "stream_options",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
    + ("safety_identifier", "parallel_tool_calls")
)
STRUCTURE = ("json_schema", "regex", "choice", "grammar")  # of which a text can be held to one
ASKS_NOTHING = {  # values of what is not served that ask for nothing
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
}
BROKEN = "\ufffd"  # in the text of a token that is a part of a character
NO_LIMIT = 2**31 - 1  # of tokens to make: the context's end is one
USUAL_TEXT_TOKENS = 16


class OpenAI:
    """Requests from OpenAI's, records in OpenAI's form.

    Args:
      config: of the run. Its sampling holds for what a body does not say.
      token_text: the text of a token id, for log-probabilities.
      created: when the run began, in Unix seconds.
    """

    def __init__(self, config: Config, token_text: Callable[[int], str], created: int):
        self._config = config
        self._usual = config.sampling.given()
        self._token_text = token_text
        self._created = created

    def request(self, row: Row, fields: Fields) -> Request:
        """What the row asks. Raises `RowError` for what cannot be served, naming it."""
        if missing := sorted(OPENAI_KEYS - fields.keys()):
            raise RowError(
                f"has no {missing[0]!r}: a batch request has custom_id, method, url and body."
            )
        url, body = fields["url"], fields["body"]
        if not isinstance(fields["custom_id"], str):
            raise RowError(f"custom_id is {fields['custom_id']!r}: must be a text.")
        if fields["method"] != "POST" or url not in (CHAT, TEXT):
            raise RowError(f"asks {fields['method']} {url}: must be POST {CHAT} or POST {TEXT}.")
        if not isinstance(body, Mapping):
            raise RowError("body: must be an object.")
        prompt = _messages(body) if url == CHAT else _prompt(body)
        usual = {
            "max_tokens": NO_LIMIT if url == CHAT else USUAL_TEXT_TOKENS,
            "seed": row_seed(self._config.seed, row.number),
        }
        return Request(prompt, usual | self._usual | _sampling(body, url == CHAT))

    def record(self, row: Row, fields: Fields, result: Any) -> Record:
        """The answer to a request."""
        chat = fields["url"] == CHAT
        top = (self._usual | _sampling(fields["body"], chat)).get("logprobs") or 0
        choices = [
            self._chat_choice(made, top) if chat else self._text_choice(made)
            for made in result.outputs
        ]
        prompt_tokens = len(result.prompt_token_ids)
        made = sum(len(one.token_ids) for one in result.outputs)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": made,
            "total_tokens": prompt_tokens + made,
        }
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._id(row)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": self._config.model,
            "choices": choices,
            "usage": usage,
        }
        return Record(
            self._line(row, fields, self._response(row, 200, body), None), prompt_tokens, made
        )

    def failed(
        self, row: Row, fields: Fields | None, message: str, *, fault: bool = False
    ) -> Record:
        """The answer to a request that was not served, or that is none; `fault`: the engine's, not the request's."""
        where = f"line {row.line}: {message}"
        if fields is None or not isinstance(fields.get("custom_id"), str):
            error = {"code": "invalid_request", "message": where}
            return Record(self._line(row, {"custom_id": None}, None, error), ok=False)
        kind = "server_error" if fault else "invalid_request_error"
        body = {"error": {"message": where, "type": kind, "param": None, "code": None}}
        return Record(
            self._line(row, fields, self._response(row, 500 if fault else 400, body), None),
            ok=False,
        )

    def _line(self, row: Row, fields: Fields, response: Any, error: Any) -> dict[str, Any]:
        line = {"id": f"batch_req_{self._id(row)}", "custom_id": fields["custom_id"]}
        return line | {"response": response, "error": error}

    def _response(self, row: Row, status: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"status_code": status, "request_id": f"req_{self._id(row)}", "body": body}

    def _id(self, row: Row) -> str:
        """A name for what was asked, the same whenever the run is made."""
        what = f"{self._config.model} {self._config.seed} {row.number}"
        return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()

    def _chat_choice(self, made: Any, top: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": made.text, "refusal": None}
        logprobs = (
            None
            if made.logprobs is None
            else {"content": self._chat_logprobs(made, top), "refusal": None}
        )
        return {
            "index": made.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(made),
        }

    def _chat_logprobs(self, made: Any, top: int) -> list[dict[str, Any]]:
        """Each token made, and beside it the `top` likeliest, whether it is one of them or not."""

        def named(token: int, logprob: float) -> dict[str, Any]:
            text = self._token_text(token)
            return {
                "token": text,
                "logprob": logprob,
                "bytes": None if BROKEN in text else list(text.encode()),
            }

        def likeliest(step: dict[int, float]) -> list[dict[str, Any]]:
            return [named(*each) for each in itertools.islice(step.items(), top)]

        steps = zip(made.token_ids, made.logprobs, strict=True)
        return [
            named(token, step[token]) | {"top_logprobs": likeliest(step)} for token, step in steps
        ]

    def _text_choice(self, made: Any) -> dict[str, Any]:
        choice = {
            "index": made.index,
            "text": made.text,
            "finish_reason": _finish_reason(made),
            "logprobs": None,
        }
        if made.logprobs is None:
            return choice
        steps = list(zip(made.token_ids, made.logprobs, strict=True))
        tokens = [self._token_text(token) for token, _ in steps]
        return choice | {
            "logprobs": {
                "tokens": tokens,
                "token_logprobs": [step[token] for token, step in steps],
                "top_logprobs": [
                    {self._token_text(each): value for each, value in step.items()}
                    for _, step in steps
                ],
                "text_offset": list(itertools.accumulate(map(len, tokens), initial=0))[:-1],
            }
        }


def _finish_reason(made: Any) -> str:
    """As the API has it, where a text that is not complete was cut."""
    return "stop" if made.finish_reason == "stop" else "length"


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation, contents in parts joined to texts."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("body.messages: must be a list of messages.")
    return [message | {"content": _content(message.get("content"))} for message in messages]


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, dict) else part
                raise RowError(
                    f"body.messages has a part of type {kind!r}: only text can be read, under 'text'."
                )
    return "".join(texts)


def _prompt(body: Mapping[str, Any]) -> Any:
    """The one prompt: text or token ids, or a list of one."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
        if len(prompt) != 1:
            raise RowError(
                f"body.prompt is a list of {len(prompt)}: give each prompt a line of its own."
            )
        return prompt[0]
    return prompt


def _sampling(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Fields of `SamplingParams` that the body names. Raises `RowError` for one that is not known, or cannot be served."""
    own = {"messages", "max_completion_tokens", "top_logprobs"} if chat else {"prompt"}
    known = SAMPLING | WITHOUT_EFFECT | own | {"logprobs", "logit_bias", "response_format"}
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in known and value not in ASKS_NOTHING.get(name, ()):
            raise RowError(f"body.{name} is not served here.{did_you_mean(name, known)}")
    found = {name: given[name] for name in SAMPLING & given.keys()}
    if chat and "max_completion_tokens" in given:
        found["max_tokens"] = given["max_completion_tokens"]
    if "logit_bias" in given:
        found["logit_bias"] = _bias(given["logit_bias"])
    if isinstance(seed := given.get("seed"), int) and seed < 0:
        found["seed"] = seed % 2**64  # the API has signed ones
    if "response_format" in given:
        found |= dict.fromkeys(STRUCTURE) | _structure(given["response_format"])
    if chat and "top_logprobs" in given and not given.get("logprobs"):
        raise RowError("body.top_logprobs goes with logprobs: true.")
    if chat and "logprobs" in given:
        found["logprobs"] = given.get("top_logprobs", 0) if given["logprobs"] else None
    elif not chat and given.get("logprobs") is not None:
        found["logprobs"] = given["logprobs"]
    return found


def _structure(asked: Any) -> dict[str, Any]:
    """What `response_format` holds the text to."""
    match asked:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json_schema": schema}
    raise RowError(
        f"body.response_format is {asked!r}: must be of type text, json_object, or json_schema with a schema."
    )


def _bias(given: Any) -> dict[int, Any]:
    try:
        return {int(token): value for token, value in given.items()}
    except (AttributeError, ValueError):
        raise RowError(f"body.logit_bias is {given!r}: must map token ids to numbers.") from None
