"""Tokenizer: text to token ids and back, and chat messages to text.

`Tokenizer` is a thin wrapper around a `tokenizers.Tokenizer`, or any object with `encode` and
`decode`. Chat templates are rendered in Jinja's sandbox by the rules that Hugging Face documents.
It is compared and hashed by identity, as static data of a pytree must be. transformers is not used:
it imports torch where torch is installed.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt, TypeAlias

from jfp8kv.core.errors import ConfigError

Message: TypeAlias = Mapping[str, object]
"""One message of a conversation: `role` and `content`, and other fields of the chat template."""


class Tokenizer:
    """A tokenizer with its chat template and end-of-sequence tokens.

        tokenizer = jfp8kv.load("path").tokenizer
        ids = tokenizer.chat([{"role": "user", "content": "Hello"}])

    Args:
      backend: an object with `encode(text, add_special_tokens=)`, which returns ids or an object
        with `.ids`, and `decode(ids, skip_special_tokens=)`.
      chat_template: a Jinja template, or None.
      special_tokens: variables of the template, such as `{"bos_token": "<s>"}`.
      eos_ids: the token ids that end an output.
    """

    def __init__(
        self,
        backend: Any,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, object] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self.eos_ids = tuple(eos_ids)

    @property
    def vocab(self) -> int:
        """The number of tokens, including special ones. A model may pad its `vocab` beyond it."""
        return len(self._backend.get_vocab())

    @property
    def backend(self) -> Any:
        """The wrapped tokenizer."""
        return self._backend

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the model, or None."""
        return self._chat_template

    @property
    def special_tokens(self) -> dict[str, object]:
        """Variables of the chat template, such as `{"bos_token": "<s>"}`."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        `add_special_tokens`: whether to add those of the model's tokenizer, such as a leading BOS.
        """
        return self._ids(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[SupportsInt], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Incomplete characters become U+FFFD."""
        text: str = self._backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation, rendered by the chat template.

        Args:
          messages: `[{"role": "user", "content": "..."}, ...]`.
          add_generation_prompt: whether to end with the start of the assistant's message.

        Raises `ConfigError` if there is no chat template, or if it refuses the messages.
        """
        return self._ids(self.render(messages, add_generation_prompt), add_special_tokens=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, with special tokens written out. See `chat`."""
        if self._chat_template is None:
            raise ConfigError(
                "This model's tokenizer has no chat template: "
                "give a plain text prompt instead of messages."
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
    """Return a `Tokenizer` that wraps the given one. None stays None.

    Args:
      tokenizer: a `Tokenizer`, a tokenizer of `tokenizers` or `transformers`, or an object with
        `encode` and `decode`.
      eos_ids: the end-of-sequence tokens, instead of those the tokenizer names.
    """
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not callable(getattr(tokenizer, "encode", None)) or not callable(
        getattr(tokenizer, "decode", None)
    ):
        raise ConfigError(
            f"tokenizer of type {type(tokenizer).__name__}: must be None, a Tokenizer, a "
            "transformers or tokenizers tokenizer, or an object with encode and decode."
        )
    eos_id = getattr(tokenizer, "eos_token_id", None)
    template = getattr(tokenizer, "chat_template", None)
    return Tokenizer(
        getattr(tokenizer, "backend_tokenizer", tokenizer),
        chat_template=pick_template(template),
        special_tokens=getattr(tokenizer, "special_tokens_map", None),
        eos_ids=tuple(eos_ids) or (() if eos_id is None else (eos_id,)),
    )


def pick_template(template: Any) -> str | None:
    """Return the default Jinja template from a form that checkpoints use.

    The forms are a string, `{name: template}`, and `[{"name": ..., "template": ...}]`.
    """
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    chosen: str | None = template.get("default") if isinstance(template, Mapping) else template
    return chosen


def check_messages(messages: object) -> None:
    """Raise `ConfigError` for the first message that is not `{"role": str, "content": ...}`."""
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


def render_template(template: str, **variables: object) -> str:
    """Return the text of a chat template.

    The sandbox keeps the template of a checkpoint from running code. Source: Hugging Face's
    documentation of chat templates (`trim_blocks`, `lstrip_blocks`, `raise_exception`,
    `strftime_now`, `tojson` without HTML escapes, `{% generation %}` blocks).
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`, a mark for training, is ignored here."""

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
