"""Prompts from rows: sandboxed Jinja templates, in which a missing field or a null is an error."""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jfp8kv.batch.config import Config, MessageTemplate
from jfp8kv.core.errors import ConfigError, did_you_mean
from jfp8kv.text.chat import ChatOptions
from jfp8kv.text.prompts import ChatPrompt, Prompt
from jfp8kv.text.rows import Fields, RowError, prompt_of

# Errors that an expression in a template can raise, such as {{ 1 / 0 }} or {{ "a" + 1 }}.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null
    )


def _refuse_null(value: Any) -> Any:
    """Return the value of an expression. Raises `RowError` for a null, which would read "None"."""
    if value is None:
        raise RowError(
            "the template uses a null, which has no text: write {{ field or '' }} to allow it."
        )
    return value


@cache
def compiled(text: str) -> Template:
    """Return the template in `text`. Raises `ConfigError` with the line of a syntax error."""
    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        problem = (error.message or "syntax error").rstrip(".")
        raise ConfigError(f"invalid template, line {error.lineno}: {problem}.") from None


def render(template: Template, fields: Fields) -> str:
    """Render a template for a row. Raises `RowError` for a missing field or a failed expression."""
    try:
        return template.render(fields)
    except RowError:
        raise
    except UndefinedError as error:
        # The name is the last one quoted: "'dict object' has no attribute 'x'".
        missing = re.findall("'([^']*)'", str(error))[-1:] or [str(error)]
        raise RowError(
            f"the template uses {missing[0]!r}: {error}.{did_you_mean(missing[0], fields)} "
            f"The row has {', '.join(map(str, fields))}."
        ) from None
    except _TEMPLATE_ERRORS as error:
        raise RowError(f"the template failed: {type(error).__name__}: {error}.") from None


def prompt_builder(config: Config) -> Callable[[Fields], Any]:
    """Return the function that builds the prompt of a row: a string, token ids or messages.

    Messages get the `chat` options of the config.
    """
    chat_fields = config.chat.given()
    if config.prompt is not None:
        return partial(render, compiled(config.prompt))
    if config.messages is not None:
        options = ChatOptions(**chat_fields) if chat_fields else None
        return partial(_render_messages, config.messages, options)
    hint = "give `prompt:` in the config, such as '{{ field }}'"
    return partial(prompt_of, hint=hint, chat_fields=chat_fields)


def _render_messages(
    messages: list[MessageTemplate], options: ChatOptions | None, fields: Fields
) -> Prompt:
    rendered = [
        {"role": message.role, "content": render(compiled(message.content), fields)}
        for message in messages
    ]
    return rendered if options is None else ChatPrompt(rendered, options)
