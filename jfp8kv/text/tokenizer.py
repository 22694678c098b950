"""Text to token ids and back, chat messages to token ids.

`Tokenizer` is a thin wrapper around a `tokenizers.Tokenizer` (or anything with `encode` and `decode`), with the chat
template rendered here by Jinja's sandbox under the rules Hugging Face documents for templates. It is compared and
hashed by identity, as static data of a pytree should be. transformers is not needed: it imports torch wherever torch
is installed.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt, TypeAlias

from jfp8kv.core.errors import ConfigError

Message: TypeAlias = Mapping[str, object]
"""One message of a conversation: `role` and `content`, and other fields of the chat template."""


class Tokenizer:
    """A tokenizer with its chat template and the ids that end a text.

    Args:
      backend: has `encode(text, add_special_tokens=)` giving ids, or an object with `.ids`, and
        `decode(ids, skip_special_tokens=)`.
      chat_template: a Jinja template, or None.
      special_tokens: what templates may name, such as `{"bos_token": "<s>", "eos_token": "</s>"}`.
      eos_ids: the token ids that end a text.
    """

    def __init__(
        self,
        backend: Any,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self.eos_ids = tuple(eos_ids)

    @property
    def vocab(self) -> int:
        """How many tokens the tokenizer knows, special ones included; a model's `vocab` may be padded beyond it."""
        return len(self._backend.get_vocab())

    @property
    def backend(self) -> Any:
        """What does the encoding."""
        return self._backend

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, or None."""
        return self._chat_template

    @property
    def special_tokens(self) -> dict[str, Any]:
        """What templates may name, such as `{"bos_token": "<s>"}`."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens (a leading BOS) that the model's tokenizer adds by itself unless told not to."""
        return self._ids(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[SupportsInt], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are not whole characters come out as U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, as the chat template lays it out; by default ready for the assistant's answer.

        Raises:
          ConfigError: no chat template, malformed messages, or messages that the template refuses.
        """
        return self._ids(self.render(messages, add_generation_prompt), add_special_tokens=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens written out. Errors as for `chat`."""
        if self._chat_template is None:
            raise ConfigError(
                "This model's tokenizer has no chat template: give a plain text prompt instead of messages."
            )
        check_messages(messages)
        return render_template(
            self._chat_template,
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise ConfigError(f"text of type {type(text).__name__}: must be a str.")
        encoded = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return list(getattr(encoded, "ids", encoded))

    def __repr__(self) -> str:
        chat = "with" if self.has_chat_template else "without"
        return f"Tokenizer({self.vocab} tokens, {chat} chat template, eos_ids={self.eos_ids})"


def as_tokenizer(tokenizer: Any, *, eos_ids: Iterable[int] = ()) -> Tokenizer | None:
    """Our `Tokenizer` around what the caller has; None stays None. `eos_ids` serve a tokenizer that names none."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not callable(getattr(tokenizer, "encode", None)) or not callable(
        getattr(tokenizer, "decode", None)
    ):
        raise ConfigError(
            f"tokenizer of type {type(tokenizer).__name__}: must be None, a Tokenizer, a transformers or tokenizers "
            "tokenizer, or an object with encode and decode."
        )
    own = getattr(tokenizer, "eos_token_id", None)
    template = getattr(tokenizer, "chat_template", None)
    return Tokenizer(
        getattr(tokenizer, "backend_tokenizer", tokenizer),
        chat_template=pick_template(template),
        special_tokens=getattr(tokenizer, "special_tokens_map", None),
        eos_ids=tuple(eos_ids) or (() if own is None else (own,)),
    )


def pick_template(template: Any) -> str | None:
    """One Jinja template from the forms checkpoints use: a string, `{name: template}`, or `[{"name", "template"}]`."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        return template.get("default")
    return template


def check_messages(messages: Any) -> None:
    """Raise a `ConfigError` naming the first message that is not `{"role": str, "content": ...}`."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(
            "messages: must be a non-empty list of {'role': ..., 'content': ...}, such as "
            "[{'role': 'user', 'content': 'Hello'}]."
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"messages[{number}]={message!r}: must be a dict with a 'role' such as 'user'."
            )
        if message.get("content") is None and "tool_calls" not in message:
            raise ConfigError(f"messages[{number}] from {message['role']!r} has no 'content'.")


def render_template(template: str, **variables: Any) -> str:
    """A chat template's text. The sandbox keeps a checkpoint's template from running code.

    Source: Hugging Face's documentation of chat templates (`trim_blocks`, `lstrip_blocks`, `raise_exception`,
    `strftime_now`, `tojson` without HTML escapes, `{% generation %}` blocks).
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is only text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return env.from_string(template).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"This model's chat template is not valid: {error}.") from error
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ConfigError(f"This model's chat template refuses these messages: {error}.") from error
