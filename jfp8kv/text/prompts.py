"""Prompts in every accepted form (text, token ids or chat messages) and their token ids."""

import dataclasses
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import numpy as np

from jfp8kv.core.errors import ConfigError, check_unicode
from jfp8kv.text.chat import ChatOptions, is_message
from jfp8kv.text.chat import Message as Message
from jfp8kv.text.tokenizer import Tokenizer


@runtime_checkable
class SupportsArray(Protocol):
    """An array of NumPy, JAX or another library, here of token ids."""

    def __array__(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ChatPrompt:
    """A conversation with the options of its chat template."""

    messages: Sequence[Message]
    options: ChatOptions


TokenIds: TypeAlias = Sequence[int] | SupportsArray
Prompt: TypeAlias = str | TokenIds | Sequence[Message] | ChatPrompt
"""One prompt: a text, token ids, or a conversation as chat messages."""
PromptLike: TypeAlias = Prompt | Sequence[Prompt]
"""One prompt or several."""
OnePrompt: TypeAlias = str | Sequence[int] | Sequence[Message] | ChatPrompt
SeveralPrompts: TypeAlias = Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Message]]
"""Prompts in the forms that a type checker can count. An array may be one prompt or several."""

FORMS = (
    "a str, a list of str, a list of token id lists, or chat messages "
    "(a list of dicts, or a list of those)"
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The token ids of a prompt, and its text if it was given as text or messages."""

    text: str | None
    ids: list[int]


def as_list(prompts: PromptLike) -> list[Prompt]:
    """Return the prompts as a list. A single prompt, in any form, becomes a list of one.

    Raises `ConfigError` for anything but a prompt or a sequence.
    """
    listed = _to_list(prompts)
    if is_single(listed):
        return [listed]
    if not isinstance(listed, Sequence):
        raise ConfigError(f"prompts of type {type(listed).__name__}: must be {FORMS}.")
    return list(listed)


def is_single(prompts: PromptLike) -> bool:
    """Return whether this is one prompt (a text, token ids or messages), not a list of them."""
    listed = _to_list(prompts)
    if isinstance(listed, str | ChatPrompt):
        return True
    if not isinstance(listed, Sequence) or not listed:
        return False
    return all(is_message(item) or _is_token_id(item) for item in listed)


def with_chat_options(prompts: Sequence[Prompt], options: ChatOptions | None) -> list[Prompt]:
    """Return conversations with the options of their chat template; None returns the prompts.

    Raises `ConfigError` for a prompt that is not a conversation.
    """
    if options is None:
        return list(prompts)
    chats: list[Prompt] = []
    for number, prompt in enumerate(prompts):
        if not is_conversation(prompt):
            given = [n for n in options.names() if getattr(options, n) != getattr(_DEFAULTS, n)]
            raise ConfigError(
                f"prompt {number} is not a list of chat messages: {', '.join(given) or 'chat'} "
                "options apply to messages only."
            )
        chats.append(ChatPrompt(prompt, options))
    return chats


_DEFAULTS = ChatOptions()


def is_conversation(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is a list of chat messages."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes) or not prompt:
        return False
    return all(is_message(item) for item in prompt)


def encode(prompt: Prompt, tokenizer: Tokenizer | None, *, what: str) -> Encoded:
    """Return the token ids of one prompt.

    Args:
      prompt: text, token ids or chat messages.
      tokenizer: required for text and messages.
      what: names the prompt in error messages.

    Raises `ConfigError` for an empty text, an unknown form, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ConfigError(f"{what} is empty: at least one character is needed.")
        return Encoded(prompt, _require(tokenizer, what).encode(check_unicode(prompt, what)))
    if isinstance(prompt, ChatPrompt):
        return _encode_chat(prompt, _require(tokenizer, what), what=what)
    listed = _to_list(prompt)
    if isinstance(listed, Sequence) and not isinstance(listed, bytes):
        if all(_is_token_id(item) for item in listed):
            return Encoded(None, [int(item) for item in listed])
        if all(is_message(item) for item in listed):
            chat = ChatPrompt(listed, _DEFAULTS)
            return _encode_chat(chat, _require(tokenizer, what), what=what)
    raise ConfigError(f"{what} is of type {type(listed).__name__}: prompts must be {FORMS}.")


def check_token_ids(
    ids: Sequence[int], vocab: int, tokenizer: Tokenizer | None, *, what: str
) -> None:
    """Raise `ConfigError` if there are no token ids, or one is outside the vocabulary.

    Args:
      ids: the token ids.
      vocab: the vocabulary size of the model.
      tokenizer: it may have more tokens than the model; the message then shows the text.
      what: names the sequence in the message.
    """
    if not ids:
        raise ConfigError(f"{what} is empty: at least one token is needed.")
    invalid = next((token for token in ids if not 0 <= token < vocab), None)
    if invalid is None:
        return
    text = tokenizer.token_text(invalid) if tokenizer is not None and invalid >= 0 else ""
    shown = f" ({text!r} of the tokenizer)" if text else ""
    raise ConfigError(
        f"{what} has the token id {invalid}{shown}: ids must be from 0 to {vocab - 1}."
    )


def _encode_chat(chat: ChatPrompt, tokenizer: Tokenizer, *, what: str) -> Encoded:
    text = check_unicode(tokenizer.render(chat.messages, chat.options), what)
    return Encoded(text, tokenizer.encode(text, add_special_tokens=False))


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """The token ids of a prompt and its completion, and how many of them are the prompt's."""

    ids: list[int]
    prompt_tokens: int


def encode_pair(prompt: Prompt, completion: str | None, tokenizer: Tokenizer | None) -> EncodedPair:
    """Return the token ids of a prompt and a completion. None: the prompt alone.

    Two texts are tokenized as one. A token that spans both belongs to the completion.

    Raises `ConfigError` as `encode` does.
    """
    if completion is None:
        return EncodedPair(encode(prompt, tokenizer, what="the prompt").ids, 0)
    if isinstance(prompt, str):
        ids = encode(prompt + completion, tokenizer, what="the text").ids
        alone = _require(tokenizer, "the text").encode(prompt)
        return EncodedPair(ids, len(commonprefix([alone, ids])))
    ids = encode(prompt, tokenizer, what="the prompt").ids
    tokenizer = _require(tokenizer, "the completion")
    return EncodedPair(ids + tokenizer.encode(completion, add_special_tokens=False), len(ids))


def _to_list(x: Any) -> Any:
    """Return an array as a list, and anything else unchanged."""
    return np.asarray(x).tolist() if hasattr(x, "__array__") else x


def _is_token_id(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _require(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(
            f"{what} is text, and this model has no tokenizer: "
            "give token ids, or Params with a tokenizer."
        )
    return tokenizer
