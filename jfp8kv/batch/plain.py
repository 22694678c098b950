"""Rows as they are: what each asks of the engine, and its fields with the result beside them."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from jfp8kv.batch.config import Config
from jfp8kv.batch.inputs import Row
from jfp8kv.batch.templates import Fields, RowError, compiled, prompter, render

RESULTS = {
    "generate": (
        "text",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "logprobs",
        "error",
    ),
    "score": ("prompt_tokens", "completion_tokens", "logprob", "logprobs", "error"),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What a row asks of the engine: to continue a prompt, or to score a completion (all of the prompt if there is none)."""

    prompt: Any
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    completion: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """What is kept of a finished row, and what it adds to the totals."""

    output: dict[str, Any]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ok: bool = True


def row_seed(seed: int, number: int) -> int:
    """A row's own seed: of the run's seed and its number in the input, whatever runs beside it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest())


class Plain:
    """Requests from fields through the config's templates; records are the fields and, beside them, the results.

    Args:
      config: of the run.
      token_text: the text of a token id, for log-probabilities.
    """

    def __init__(self, config: Config, token_text: Callable[[int], str]):
        self._task = config.task
        self._seed = config.seed
        self._sampling = config.sampling.given()
        self._prompt = prompter(config)
        self._completion = None if config.completion is None else compiled(config.completion)
        self._names = {name: config.output.prefix + name for name in RESULTS[config.task]}
        self._taken = frozenset(self._names.values())
        self._token_text = token_text

    def request(self, row: Row, fields: Fields) -> Request:
        """What the row asks. Raises `RowError` if it lacks what that takes, or has a field that a result is named after."""
        if taken := self._taken & fields.keys():
            raise RowError(
                f"has a field {min(taken)!r}, as the results do: give `output.prefix`, such as 'new_'."
            )
        if self._task == "score":
            completion = None if self._completion is None else render(self._completion, fields)
            return Request(self._prompt(fields), completion=completion)
        return Request(
            self._prompt(fields), self._sampling | {"seed": row_seed(self._seed, row.number)}
        )

    def record(self, row: Row, fields: Fields, result: Any) -> Record:
        """The row and what the engine made of it."""
        found = self._scored(result) if self._task == "score" else self._generated(result)
        named = {self._names[name]: value for name, value in (found | {"error": None}).items()}
        total = found["completion_tokens"]
        made = sum(total) if isinstance(total, list) else total
        return Record({**fields, **named}, found["prompt_tokens"], made)

    def failed(
        self, row: Row, fields: Fields | None, message: str, *, fault: bool = False
    ) -> Record:
        """The row and why it has no result; `fault`: the engine's, not the row's, which makes no difference here."""
        error = {"line": row.line, "message": message}
        kept = {name: value for name, value in (fields or {}).items() if name not in self._taken}
        nothing = {
            self._names[name]: None
            for name in RESULTS[self._task]
            if name not in ("error", "logprobs")
        }
        return Record({**kept, **nothing, self._names["error"]: error}, ok=False)

    def _generated(self, result: Any) -> dict[str, Any]:
        each = [
            {
                "text": made.text,
                "completion_tokens": len(made.token_ids),
                "finish_reason": made.finish_reason,
                **({} if made.logprobs is None else {"logprobs": self._logprobs(made)}),
            }
            for made in result.outputs
        ]
        found = (
            each[0] if len(each) == 1 else {name: [one[name] for one in each] for name in each[0]}
        )
        return {"text": found.pop("text"), "prompt_tokens": len(result.prompt_token_ids)} | found

    def _logprobs(self, made: Any) -> list[dict[str, Any]]:
        """For each token made: id, text, log-probability, and the likeliest ones'."""

        def named(token: int, logprob: float) -> dict[str, Any]:
            return {"token_id": token, "token": self._token_text(token), "logprob": logprob}

        steps = zip(made.token_ids, made.logprobs, strict=True)
        return [
            named(token, step[token]) | {"top": [named(*each) for each in step.items()]}
            for token, step in steps
        ]

    def _scored(self, result: Any) -> dict[str, Any]:
        return {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": len(result.logprobs),
            "logprob": float(sum(result.logprobs)),
            "logprobs": [float(value) for value in result.logprobs],
        }
