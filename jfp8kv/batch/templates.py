"""Prompts from rows: Jinja templates over a row's fields, in the sandbox, where an unknown field is an error.

A row that asks for something else than its config's prompt (a field it lacks, a text that is none) raises `RowError`.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jfp8kv.batch.config import Config
from jfp8kv.core.errors import ConfigError, nearest

FIELDS = ("prompt", "messages", "text")  # of a row without a template, the first there is
Fields = Mapping[str, Any]


class RowError(ConfigError):
    """A row that cannot be run; the run goes on."""


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@cache
def compiled(text: str) -> Template:
    """The template in `text`. Raises `ConfigError` for one that Jinja does not understand, by line of the template."""
    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise ConfigError(f"is no valid template, line {error.lineno} of it: {error.message}.") from None


def render(template: Template, fields: Fields) -> str:
    """The text for a row. Raises `RowError` for a field that the row lacks, and for what the template cannot do."""
    try:
        return template.render(fields)
    except UndefinedError as error:
        missing = str(error).split("'")[1] if "'" in str(error) else str(error)
        known = ", ".join(map(str, fields))
        raise RowError(f"the template wants {missing!r}: {error}.{nearest(missing, fields)} There are {known}.") from None
    except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise RowError(f"the template failed: {type(error).__name__}: {error}.") from None


def prompter(config: Config) -> Callable[[Fields], Any]:
    """What makes a row's prompt: a text, token ids, or messages."""
    if config.prompt is not None:
        template = compiled(config.prompt)
        return lambda fields: render(template, fields)
    if config.messages is not None:
        parts = [(message.role, compiled(message.content)) for message in config.messages]
        return lambda fields: [{"role": role, "content": render(content, fields)} for role, content in parts]
    return _own


def _own(fields: Fields) -> Any:
    """The prompt that a row brings itself."""
    found = next((name for name in FIELDS if name in fields), None)
    if found is None:
        there = ", ".join(map(repr, fields)) or "none"
        wanted = " or ".join(map(repr, FIELDS))
        raise RowError(f"has no {wanted}, but {there}: give `prompt:` in the config, such as '{{{{ field }}}}'.")
    return fields[found]
