"""What a request's text must look like: a JSON schema, a regular expression, one of several texts, or a grammar.

Here is the user's side: which forms each may have, and that only one is asked for. What it means, and whether it can be met, is
decided where it is compiled (engine/structured.py).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jfp8kv.core.errors import ConfigError

CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")


@dataclasses.dataclass(frozen=True)
class Constraint:
    """One of `CONSTRAINTS` and its value: a text, or a tuple of texts for `choice`."""

    field: str
    value: str | tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.field}={_short(self.value)}"


def refuse_several(given: Sequence[Constraint]) -> None:
    """Raise `ConfigError` for more than one."""
    if len(given) > 1:
        asked = " and ".join(each.field for each in given)
        raise ConfigError(f"{asked}: a text can be held to only one of {', '.join(CONSTRAINTS)}.")


def schema_text(schema: Any) -> str | None:
    """A JSON schema as JSON: from a dict, from JSON, or from a class or object with `model_json_schema()`."""
    if schema is None:
        return None
    if callable(made := getattr(schema, "model_json_schema", None)):
        schema = made()
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, Mapping):
            return json.dumps(dict(parsed), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema={_short(schema)}: is no JSON: {error}.") from None
    raise ConfigError(
        f"json_schema={_short(schema)}: must be a dict, the JSON text of one, or a class with model_json_schema() such as a "
        "pydantic model; try {'type': 'object', 'properties': {'name': {'type': 'string'}}}."
    )


def pattern(name: str, text: Any) -> str | None:
    """The text of a regular expression or a grammar."""
    return (
        None
        if text is None
        else _whole(
            name, text, f"{name}={_short(text)}: must be a string of at least one character."
        )
    )


def choices(values: Any) -> tuple[str, ...] | None:
    """The texts to choose from."""
    if values is None:
        return None
    advice = f"choice={_short(values)}: must be a list of strings of at least one character; try ['yes', 'no']."
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ConfigError(advice)
    texts = tuple(_whole("choice", value, advice) for value in values)
    if not texts:
        raise ConfigError(advice)
    return texts


def _whole(name: str, text: Any, advice: str) -> str:
    """`text`, if it is one that can be made."""
    if not isinstance(text, str) or not text:
        raise ConfigError(advice)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} is no valid text at character {error.start}: {text[error.start]!r} stands alone."
        ) from None
    return text


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
