"""The forms a prompt may come in, sorted out once: text, token ids, or chat messages; one of them or many."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
FORMS = "a str, a list of str, a list of token id lists, or chat messages (a list of dicts, or a list of those)"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prompt as ids, with the text it came from if it came as text."""

    text: str | None
    ids: list[int]


def as_list(prompts: Any) -> list[Any]:
    """The prompts as a list: a single one, in any form, becomes a list of one."""
    prompts = _plain(prompts)
    if is_single(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts of type {type(prompts).__name__}: must be {FORMS}.")
    return list(prompts)


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt rather than a list of them: a text, a list of ids, or a list of messages."""
    prompts = _plain(prompts)
    if isinstance(prompts, str):
        return True
    return (
        isinstance(prompts, Sequence)
        and bool(prompts)
        and all(isinstance(x, Mapping) or _is_id(x) for x in prompts)
    )


def encode(prompt: Any, tokenizer: Tokenizer | None, *, what: str) -> Encoded:
    """Token ids of one prompt. Raises `ConfigError` naming `what` for a form that is not understood."""
    if isinstance(prompt, str):
        if not prompt:
            raise ConfigError(f"{what} is empty: at least one character is needed.")
        return Encoded(prompt, _tokenizer(tokenizer, what).encode(_whole(prompt, what)))
    prompt = _plain(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if all(_is_id(x) for x in prompt):
            return Encoded(None, [int(x) for x in prompt])
        if all(isinstance(x, Mapping) for x in prompt):
            tokenizer = _tokenizer(tokenizer, what)
            text = _whole(tokenizer.render(prompt), what)
            return Encoded(text, tokenizer.encode(text, add_special_tokens=False))
    raise ConfigError(f"{what} is of type {type(prompt).__name__}: prompts must be {FORMS}.")


def _whole(text: str, what: str) -> str:
    """`text`, unless it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} is no valid text at character {error.start}: {text[error.start]!r} stands alone."
        ) from None
    return text


def _plain(x: Any) -> Any:
    """Arrays of NumPy, JAX and others as lists; anything else as it is."""
    return np.asarray(x).tolist() if hasattr(x, "__array__") else x


def _is_id(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _tokenizer(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(
            f"{what} is text, and this model has no tokenizer: give token ids, or Params with a tokenizer."
        )
    return tokenizer
