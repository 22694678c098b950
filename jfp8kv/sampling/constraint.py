"""Options of structured output: a JSON schema, a regular expression, a list of choices, a grammar.

This module checks their form on the host. sampling/structured.py compiles them and reports
constraints that cannot be satisfied.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from jfp8kv.core.errors import ConfigError, check_unicode

CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")


@dataclasses.dataclass(frozen=True)
class Constraint:
    """One of `CONSTRAINTS` and its value: a string, or a tuple of strings for `choice`."""

    field: str
    value: str | tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.field}={_short(self.value)}"


def check_single(constraints: Sequence[Constraint]) -> None:
    """Raise `ConfigError` if there is more than one constraint."""
    if len(constraints) > 1:
        names = " and ".join(constraint.field for constraint in constraints)
        raise ConfigError(f"{names}: a request can have only one of {', '.join(CONSTRAINTS)}.")


def schema_json(schema: object) -> str | None:
    """Return a JSON schema as JSON text.

    Accepts a dict, JSON text, or a class or object with `model_json_schema()`.
    """
    if schema is None:
        return None
    model_schema = getattr(schema, "model_json_schema", None)
    if callable(model_schema):
        schema = model_schema()
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, Mapping):
            return json.dumps(dict(parsed), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema={_short(schema)}: invalid JSON: {error}.") from None
    raise ConfigError(
        f"json_schema={_short(schema)}: must be a dict, the JSON text of one, or a class with "
        "model_json_schema() such as a pydantic model; "
        "try {'type': 'object', 'properties': {'name': {'type': 'string'}}}."
    )


def pattern(name: str, text: object) -> str | None:
    """Return the text of a regular expression or a grammar, checked."""
    if text is None:
        return None
    advice = f"{name}={_short(text)}: must be a string of at least one character."
    return _check_text(name, text, advice)


def choices(values: object) -> tuple[str, ...] | None:
    """Return the strings to choose from, checked."""
    if values is None:
        return None
    advice = (
        f"choice={_short(values)}: must be a list of strings of at least one character; "
        "try ['yes', 'no']."
    )
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ConfigError(advice)
    texts = tuple(_check_text("choice", value, advice) for value in values)
    if not texts:
        raise ConfigError(advice)
    return texts


def _check_text(name: str, text: object, advice: str) -> str:
    """Return `text` if it is a non-empty string that UTF-8 can encode."""
    if not isinstance(text, str) or not text:
        raise ConfigError(advice)
    return check_unicode(text, name)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
