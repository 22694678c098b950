"""Prompts from rows: Jinja templates over a row's fields, in the sandbox, where a missing field is an error, and so is a null.

A row that asks for something else than its config's prompt (a field it lacks, a text that is none) raises `RowError`.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jfp8kv.batch.config import Config
from jfp8kv.core.errors import ConfigError, did_you_mean

FIELDS = ("prompt", "messages", "text")  # of a row without a template, the first there is
Fields = Mapping[str, Any]


class RowError(ConfigError):
    """A row that cannot be run; the run goes on."""


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_shown
    )


def _shown(value: Any) -> Any:
    """What an expression puts into the text. Nobody wants the word None in a prompt."""
    if value is None:
        raise RowError(
            "the template meets a null, which is no text: say {{ field or '' }} where there may be one."
        )
    return value


@cache
def compiled(text: str) -> Template:
    """The template in `text`. Raises `ConfigError` for one that Jinja does not understand, by line of the template."""
    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"is no valid template, line {error.lineno} of it: {error.message}."
        ) from None


def render(template: Template, fields: Fields) -> str:
    """The text for a row. Raises `RowError` for a field that the row lacks, and for what the template cannot do."""
    try:
        return template.render(fields)
    except UndefinedError as error:
        missing = re.findall("'([^']*)'", str(error))[-1:] or [
            str(error)
        ]  # "'dict object' has no attribute 'x'"
        known = ", ".join(map(str, fields))
        raise RowError(
            f"the template wants {missing[0]!r}: {error}.{did_you_mean(missing[0], fields)} There are {known}."
        ) from None
    except RowError:
        raise
    except Exception as error:  # a template may do anything
        raise RowError(f"the template failed: {type(error).__name__}: {error}.") from None


def prompter(config: Config) -> Callable[[Fields], Any]:
    """What makes a row's prompt: a text, token ids, or messages."""
    if config.prompt is not None:
        template = compiled(config.prompt)
        return lambda fields: render(template, fields)
    if config.messages is not None:
        parts = [(message.role, compiled(message.content)) for message in config.messages]
        return lambda fields: [
            {"role": role, "content": render(content, fields)} for role, content in parts
        ]
    return _own


def _own(fields: Fields) -> Any:
    """The prompt that a row brings itself."""
    found = next((name for name in FIELDS if name in fields), None)
    if found is None:
        there = ", ".join(map(repr, fields)) or "none"
        wanted = " or ".join(map(repr, FIELDS))
        raise RowError(
            f"has no {wanted}, but {there}: give `prompt:` in the config, such as '{{{{ field }}}}'."
        )
    return fields[found]
