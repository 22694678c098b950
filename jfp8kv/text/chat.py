"""Chat messages to text, by the rules of transformers' `apply_chat_template`.

A checkpoint's Jinja template is rendered by transformers, in its sandbox. This module selects the
template, checks the messages, and joins their parts where the template takes only strings.
"""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from jfp8kv.core.errors import ConfigError
from jfp8kv.core.options import Options, option, options

Message: TypeAlias = Mapping[str, object]
"""One message of a conversation: `role` and `content`, and other fields of the chat template."""
Templates: TypeAlias = str | Mapping[str, str] | None
"""A chat template, several by name, or none."""

TEXT_PART = "text"
MEDIA_KEYS = ("image", "images", "audio", "video", "videos")
# Variables of a template that are options themselves.
RESERVED = ("messages", "conversations", "tools", "documents", "chat_template")
RESERVED_FLAGS = (
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)


def _mappings(name: str, values: Any, what: str, *, functions: bool = False) -> Any:
    if values is None:
        return None
    valid = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not valid or not all(
        isinstance(value, Mapping) or (functions and callable(value)) for value in values
    ):
        raise ConfigError(f"{name}={values!r}: must be {what}.")
    return list(values)


def _tools(values: Any) -> Any:
    what = "a list of JSON schemas (dicts) or of Python functions with type hints and a docstring"
    return _mappings("tools", values, what, functions=True)


def _documents(values: Any) -> Any:
    return _mappings("documents", values, "a list of dicts with 'title' and 'text'")


def _template_kwargs(values: Any) -> Any:
    if values is None:
        return None
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            f"chat_template_kwargs={values!r}: must be a dict; try {{'enable_thinking': False}}."
        )
    for name in (*RESERVED, *RESERVED_FLAGS):
        if name in values:
            raise ConfigError(f"chat_template_kwargs: {name!r} is an option itself: give {name}=.")
    return dict(values)


def _continued_field(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise ConfigError(
        f"continue_final_message={value!r}: must be True, False, or the name of a field of the "
        "final message such as 'reasoning_content'."
    )


@options
class ChatOptions(Options):
    """How chat messages become a prompt, as in transformers' `apply_chat_template`.

    llm.chat(messages, tools=[get_weather], chat_template_kwargs={"enable_thinking": False})
    """

    ARGUMENT = "chat_options"

    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = option(
        default=None,
        help="Tools the model may call: JSON schemas, or functions with type hints and docstring.",
        convert=_tools,
        hash=False,
    )
    documents: Sequence[Mapping[str, Any]] | None = option(
        default=None,
        help="Documents for templates with retrieval: dicts with title and text.",
        convert=_documents,
        hash=False,
    )
    chat_template: str | None = option(
        default=None,
        help=(
            "A Jinja template, or the name of one of the model's templates. By default the "
            "model's template; of several the one named tool_use with tools, else default."
        ),
    )
    chat_template_kwargs: Mapping[str, Any] | None = option(
        default=None,
        help="Further variables of the template, such as enable_thinking.",
        convert=_template_kwargs,
        hash=False,
    )
    add_generation_prompt: bool | None = option(
        default=None,
        help="End with the header of an assistant message. By default unless a message continues.",
    )
    continue_final_message: bool | str = option(
        default=False,
        help="Leave the final message open, so that the output continues its content (or field).",
        convert=_continued_field,
    )

    def check(self) -> None:
        """Raise `ConfigError` for an invalid combination of fields."""
        if self.continue_final_message and self.add_generation_prompt:
            raise ConfigError(
                "continue_final_message continues the last message and add_generation_prompt "
                "starts another: give one of them."
            )

    @property
    def generation_prompt(self) -> bool:
        """Whether the prompt ends with the header of an assistant message."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def split_fields(fields: Mapping[str, Any]) -> tuple[ChatOptions | None, dict[str, Any]]:
    """Return the chat options among keywords, None if there are none, and the other keywords."""
    names = ChatOptions.names()
    chat = {name: value for name, value in fields.items() if name in names}
    others = {name: value for name, value in fields.items() if name not in names}
    return (ChatOptions(**chat) if chat else None), others


def is_message(value: object) -> bool:
    """Return whether a value is a message: a mapping, a pydantic model or a dataclass."""
    if isinstance(value, type):
        return False
    return (
        isinstance(value, Mapping)
        or callable(getattr(value, "model_dump", None))
        or (dataclasses.is_dataclass(value) and hasattr(value, "role"))
    )


def normalize_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as dicts without the keys whose value is None, as transformers has it.

    Raises `ConfigError` naming the first message that a text model cannot have.
    """
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not messages:
        raise ConfigError(
            "messages: must be a non-empty list of {'role': ..., 'content': ...}, such as "
            "[{'role': 'user', 'content': 'Hello'}]."
        )
    return [_normalized(number, message) for number, message in enumerate(messages)]


def _normalized(number: int, message: Any) -> dict[str, Any]:
    fields = _plain(message)
    if not isinstance(fields, dict) or not isinstance(fields.get("role"), str):
        raise ConfigError(
            f"messages[{number}]={message!r}: must be a dict with a 'role' such as 'user'."
        )
    where = f"messages[{number}] from {fields['role']!r}"
    if set(fields) == {"role"}:
        raise ConfigError(f"{where} has no 'content'.")
    given = {name: value for name, value in fields.items() if value is not None}
    for key in MEDIA_KEYS:
        if key in given:
            raise ConfigError(f"{where} has {key!r}: the model runs on text only.")
    content = given.get("content", "")
    if isinstance(content, list | tuple):
        given["content"] = [_checked_part(part, where) for part in content]
    elif not isinstance(content, str):
        raise ConfigError(
            f"{where} has content of type {type(content).__name__}: must be a string, a list of "
            "text parts, or None."
        )
    return given


def _checked_part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == TEXT_PART and isinstance(part.get("text"), str):
        return {"type": TEXT_PART, "text": part["text"]}
    if isinstance(kind, str) and kind != TEXT_PART:
        raise ConfigError(f"{where} has a part of type {kind!r}: the model runs on text only.")
    raise ConfigError(
        f"{where} has the part {part!r}: must be {{'type': 'text', 'text': ...}} with a string."
    )


def _plain(value: Any) -> Any:
    """Return message objects, also nested ones, as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if callable(getattr(value, "model_dump", None)) and not isinstance(value, type):
        return _plain(value.model_dump())
    return value


def select_template(templates: Templates, chat: ChatOptions) -> str:
    """Return the template of a conversation. Raises `ConfigError` if there is none."""
    if isinstance(templates, Mapping):
        if chat.chat_template is not None:
            return templates.get(chat.chat_template, chat.chat_template)
        name = "tool_use" if chat.tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            raise ConfigError(
                "This model has several chat templates and no default: give chat_template, one of "
                f"{', '.join(sorted(templates))}."
            )
        return templates[name]
    template = templates if chat.chat_template is None else chat.chat_template
    if template is None:
        raise ConfigError(
            "This model's tokenizer has no chat template: give a plain text prompt instead of "
            "messages, or chat_template."
        )
    return template


def render_chat(
    messages: Any,
    chat: ChatOptions,
    *,
    templates: Templates,
    special_tokens: Mapping[str, str],
) -> str:
    """Return the text of a conversation, special tokens written out.

    A template that takes content in parts gets the parts. For any other, the parts of a message are
    joined with newlines.

    Args:
      messages: a conversation.
      chat: its options.
      templates: the model's chat templates.
      special_tokens: by role, such as `{"bos_token": "<s>"}`.

    Raises `ConfigError` for messages that are malformed or that the template refuses.
    """
    template = select_template(templates, chat)
    normalized = normalize_messages(messages)
    variables = {**special_tokens, **(chat.chat_template_kwargs or {})}
    joined = [_join_parts(message) for message in normalized]
    if joined == normalized:
        return _render(template, normalized, chat, variables)
    try:
        by_parts = _render(template, normalized, chat, variables)
    except ConfigError:
        return _render(template, joined, chat, variables)
    try:
        by_strings = _render(template, joined, chat, variables)
    except ConfigError:
        return by_parts
    return by_parts if _took_parts(by_parts, by_strings, normalized) else by_strings


def _join_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _took_parts(by_parts: str, by_strings: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a template rendered parts as text: each of them, and none as a dict."""
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list):
            continue
        if any(part["text"].strip() not in by_parts for part in content):
            return False
    written_out = ("'text':", '"text":')
    return all(by_parts.count(key) <= by_strings.count(key) for key in written_out)


def _render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    chat: ChatOptions,
    variables: Mapping[str, Any],
) -> str:
    from jinja2 import TemplateSyntaxError

    tools = chat.tools
    if tools is not None:
        tools = [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools]
    documents = chat.documents
    if documents is not None:
        documents = [dict(document) for document in documents]
    try:
        rendered, _ = _template_renderer()(
            conversations=[[dict(message) for message in messages]],
            tools=tools,
            documents=documents,
            chat_template=template,
            add_generation_prompt=chat.generation_prompt,
            continue_final_message=chat.continue_final_message,
            **variables,
        )
    except TemplateSyntaxError as error:
        raise ConfigError(f"The chat template is not valid: {error}.") from error
    except Exception as error:  # noqa: BLE001 (a template is the checkpoint's code)
        reason = str(error).rstrip(".") or type(error).__name__
        raise ConfigError(f"The chat template refuses these messages: {reason}.") from error
    text: str = rendered[0]
    return text


@functools.cache
def _template_renderer() -> Callable[..., Any]:
    """Return transformers' renderer of chat templates. It does not import torch."""
    with quiet_transformers():
        from transformers.utils.chat_template_utils import render_jinja_template
    renderer: Callable[..., Any] = render_jinja_template
    return renderer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import or use transformers without its advice on torch and its log lines.

    Importing `AutoTokenizer` imports torch where it is installed, which is why no module does it at
    the top.
    """
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
