"""Text to token ids and back, and chat messages to token ids."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt, Unpack

from jfp8kv.core.errors import ConfigError
from jfp8kv.text.chat import ChatOptions, Message, Templates, render_chat
from jfp8kv.text.keywords import ChatFields


class Tokenizer:
    """A tokenizer with its chat template and its end-of-sequence tokens.

    It is compared and hashed by identity, as static data of a pytree.

    Args:
      backend: a `tokenizers.Tokenizer`, or an object with `encode(text, add_special_tokens=)`
        (returns ids, or an object with `.ids`) and `decode(ids, skip_special_tokens=)`.
      chat_template: a Jinja template, several by name, or None.
      special_tokens: variables of the template by role, such as `{"bos_token": "<s>"}`.
      eos_ids: the ids of the end-of-sequence tokens.
    """

    def __init__(
        self,
        backend: Any,
        *,
        chat_template: Templates = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self.eos_ids = tuple(eos_ids)

    @property
    def vocab(self) -> int:
        """The number of tokens, special ones included. A model's `vocab` may be larger."""
        return len(self._backend.get_vocab())

    @property
    def backend(self) -> Any:
        """The object that encodes and decodes."""
        return self._backend

    @property
    def chat_template(self) -> Templates:
        """The Jinja template of conversations, several by name, or None."""
        return self._chat_template

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The special tokens by role, such as `{"bos_token": "<s>"}`."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._chat_template is not None

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the tokens that `skip_special_tokens` removes, by their text."""
        decoder = getattr(self._backend, "get_added_tokens_decoder", None)
        added = decoder() if callable(decoder) else {}
        return {token.content: number for number, token in added.items() if token.special}

    def token_text(self, token: int) -> str:
        """Return the text of one token, special or not."""
        return self.decode([token], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Special tokens that the tokenizer adds itself, such as a leading BOS, are left out if
        `add_special_tokens` is False.
        """
        return self._ids(text, add_special_tokens=add_special_tokens)

    def decode(
        self,
        ids: Iterable[SupportsInt],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the text of token ids. Bytes of incomplete characters become U+FFFD.

        Args:
          ids: token ids.
          skip_special_tokens: leave special tokens out.
          spaces_between_special_tokens: keep the spaces that some decoders write between two
            special tokens.
        """
        numbers = [int(i) for i in ids]
        text: str = self._backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        if skip_special_tokens or spaces_between_special_tokens:
            return text
        return self._without_spaces(text, numbers)

    def _without_spaces(self, text: str, ids: Sequence[int]) -> str:
        """Remove the space between each two special tokens that are neighbours."""
        special = {number: content for content, number in self.special_ids.items()}
        position = 0
        for left, right in itertools.pairwise(ids):
            if left in special and right in special:
                found = text.find(f"{special[left]} {special[right]}", position)
                if found >= 0:
                    position = found + len(special[left])
                    text = text[:position] + text[position + 1 :]
        return text

    def chat(
        self,
        messages: Sequence[Message],
        chat_options: ChatOptions | None = None,
        **fields: Unpack[ChatFields],
    ) -> list[int]:
        """Return the token ids of a conversation. Arguments and errors are those of `render`."""
        return self._ids(self.render(messages, chat_options, **fields), add_special_tokens=False)

    def render(
        self,
        messages: Sequence[Message],
        chat_options: ChatOptions | None = None,
        **fields: Unpack[ChatFields],
    ) -> str:
        """Return the text of a conversation, special tokens written out.

        By default it ends with the header of the assistant's answer.

        Args:
          messages: the conversation.
          chat_options: the options of the template.
          **fields: fields of `ChatOptions`. They override those of `chat_options`.

        Raises:
          ConfigError: no chat template, malformed messages, or messages that the template refuses.
        """
        return render_chat(
            messages,
            ChatOptions.from_fields(chat_options, **fields),
            templates=self._chat_template,
            special_tokens=self._special_tokens,
        )

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise ConfigError(f"text of type {type(text).__name__}: must be a str.")
        encoded = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return list(getattr(encoded, "ids", encoded))

    def __repr__(self) -> str:
        chat = "with" if self.has_chat_template else "without"
        return f"Tokenizer({self.vocab} tokens, {chat} chat template, eos_ids={self.eos_ids})"


def as_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Return a `Tokenizer` around the caller's tokenizer; None stays None.

    Raises `ConfigError` for an object without `encode` and `decode`.
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
    eos = getattr(tokenizer, "eos_token_id", None)
    return Tokenizer(
        getattr(tokenizer, "backend_tokenizer", tokenizer),
        chat_template=named_templates(getattr(tokenizer, "chat_template", None)),
        special_tokens=getattr(tokenizer, "special_tokens_map", None),
        eos_ids=() if eos is None else (eos,),
    )


def named_templates(templates: Any) -> Templates:
    """Return templates by name from the forms of checkpoints: `[{"name", "template"}]` too."""
    if isinstance(templates, list | tuple):
        return {entry["name"]: entry["template"] for entry in templates}
    return templates
