"""Build requests from rows by the templates of the config, and output rows from the results.

A request format (`TemplatedRequests` here, `OpenAIRequests` in `openai`) converts rows to requests
for the engine, and results of the engine to output rows.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from jfp8kv.batch.config import Config
from jfp8kv.batch.templates import compiled, prompt_builder, render
from jfp8kv.text.rows import Fields, Row, RowError

if TYPE_CHECKING:
    from jfp8kv.engine.request import CompletionOutput, RequestOutput
    from jfp8kv.engine.scoring import Scored
    from jfp8kv.text.prompts import Prompt

GENERATED_FIELDS = (
    "text",
    "prompt_tokens",
    "completion_tokens",
    "finish_reason",
    "logprobs",
    "error",
)
SCORED_FIELDS = ("prompt_tokens", "completion_tokens", "logprob", "logprobs", "error")
OPTIONAL_FIELDS = ("logprobs", "error")


@dataclass(frozen=True)
class RowRequest:
    """The request of one row.

    Attributes:
      prompt: a string, token ids or messages.
      sampling: fields of `SamplingParams`.
      completion: for scoring, the text after the prompt; None scores the prompt.
    """

    prompt: "Prompt"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    completion: str | None = None


@dataclass(frozen=True)
class RowResult:
    """The output row of a finished row, and its share of the totals."""

    output: dict[str, Any]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ok: bool = True


class RequestFormat(Protocol):
    """Conversion of rows to requests, and of results to output rows."""

    def request(self, row: Row, fields: Fields) -> RowRequest:
        """Return the request of a row. Raises `RowError` for a row without a valid one."""

    def result(self, row: Row, fields: Fields, result: "RequestOutput | Scored") -> RowResult:
        """Return the output row of a result."""

    def failure(
        self, row: Row, fields: Fields | None, message: str, *, engine_error: bool = False
    ) -> RowResult:
        """Return the output row of a row that failed.

        Args:
          row: the row.
          fields: its fields; None if it could not be parsed.
          message: why it failed.
          engine_error: whether the engine failed, as opposed to an invalid request.
        """


def row_seed(seed: int, number: int) -> int:
    """Return the seed of a row, which depends on the seed of the run and the row number only."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest())


class TemplatedRequests:
    """Requests from the templates of the config; output rows are the fields plus the results.

    Args:
      config: the config of the run.
      token_text: returns the text of a token id, for log-probabilities.
    """

    def __init__(self, config: Config, token_text: Callable[[int], str]):
        self._scores = config.task == "score"
        self._seed = config.seed
        self._sampling = config.sampling.given()
        self._prompt = prompt_builder(config)
        self._completion = None if config.completion is None else compiled(config.completion)
        names = SCORED_FIELDS if self._scores else GENERATED_FIELDS
        self._names = {name: config.output.prefix + name for name in names}
        self._reserved = frozenset(self._names.values())
        self._token_text = token_text

    def request(self, row: Row, fields: Fields) -> RowRequest:
        """Return the request of a row.

        Raises `RowError` for a missing field, or a field with the name of a result.
        """
        conflicts = self._reserved & fields.keys()
        if conflicts:
            raise RowError(
                f"the field {min(conflicts)!r} has the name of a result: give `output.prefix`, "
                "such as 'new_'."
            )
        if not self._scores:
            sampling = self._sampling | {"seed": row_seed(self._seed, row.number)}
            return RowRequest(self._prompt(fields), sampling)
        completion = None if self._completion is None else render(self._completion, fields)
        return RowRequest(self._prompt(fields), completion=completion)

    def result(self, row: Row, fields: Fields, result: "RequestOutput | Scored") -> RowResult:
        """Return the fields of the row plus the result."""
        if self._scores:
            values = _scored(cast("Scored", result))
        else:
            values = self._generated(cast("RequestOutput", result))
        counts = values["completion_tokens"]
        return RowResult(
            output={**fields, **self._named(values | {"error": None})},
            prompt_tokens=values["prompt_tokens"],
            completion_tokens=sum(counts) if isinstance(counts, list) else counts,
        )

    def failure(
        self, row: Row, fields: Fields | None, message: str, *, engine_error: bool = False
    ) -> RowResult:
        """Return the fields of the row plus the error."""
        known = {
            name: value for name, value in (fields or {}).items() if name not in self._reserved
        }
        values: dict[str, Any] = {name: None for name in self._names if name not in OPTIONAL_FIELDS}
        values["error"] = {"line": row.line, "message": message}
        return RowResult(output=known | self._named(values), ok=False)

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self._names[name]: value for name, value in values.items()}

    def _generated(self, result: "RequestOutput") -> dict[str, Any]:
        completions = [self._completion_fields(completion) for completion in result.outputs]
        values = completions[0]
        if len(completions) > 1:
            values = {name: [fields[name] for fields in completions] for name in values}
        text = {"text": values.pop("text"), "prompt_tokens": len(result.prompt_token_ids)}
        return text | values

    def _completion_fields(self, completion: "CompletionOutput") -> dict[str, Any]:
        values: dict[str, Any] = {
            "text": completion.text,
            "completion_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        if completion.logprobs is not None:
            steps = zip(completion.token_ids, completion.logprobs, strict=True)
            values["logprobs"] = [
                self._token(token, top[token])
                | {"top": [self._token(other, logprob) for other, logprob in top.items()]}
                for token, top in steps
            ]
        return values

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token, "token": self._token_text(token), "logprob": logprob}


def _scored(result: "Scored") -> dict[str, Any]:
    logprobs = [float(value) for value in result.logprobs]
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(logprobs),
        "logprob": float(sum(logprobs)),
        "logprobs": logprobs,
    }
