"""Prompts in, pieces of token ids out, one prompt at a time."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jfp8kv.core.errors import CapacityError, ConfigError
from jfp8kv.models.params import Params
from jfp8kv.text.prompts import FORMS, as_list, encode

SPOOL_BYTES = 32 * 2**20  # token ids kept in memory before they go to a temporary file


def stream(prompts: Any, what: str = "prompts") -> tuple[Iterable[Any], int | None]:
    """The prompts to go through and how many there are, None for an iterable that does not say.

    What is no list is taken one by one and never kept. Raises `ConfigError` for what holds no prompts.
    """
    if isinstance(prompts, bytes | Mapping) or not (
        hasattr(prompts, "__iter__") or hasattr(prompts, "__array__")
    ):
        raise ConfigError(
            f"{what} of type {type(prompts).__name__}: must be {FORMS}, or an iterable of prompts."
        )
    if isinstance(prompts, Sequence) or hasattr(prompts, "__array__"):
        prompts = as_list(prompts)
    return prompts, len(prompts) if hasattr(prompts, "__len__") else None


def pieces(
    prompts: Iterable[Any],
    params: Params,
    *,
    max_model_len: int,
    window: int | None,
    what: str = "prompt",
) -> Iterator[list[list[int]]]:
    """The token ids of each prompt: whole, or cut into pieces of `window` tokens, the last perhaps shorter.

    Raises `ConfigError` for a prompt that is empty, no prompt, or holds an id beyond the vocabulary, and `CapacityError` for
    one that is longer than `max_model_len` and not to be cut.
    """
    for number, prompt in enumerate(prompts):
        name = f"{what} {number}"
        ids = encode(prompt, params.tokenizer, what=name).ids
        _check(ids, params.config.vocab, name)
        if window is None and len(ids) > max_model_len:
            raise CapacityError(
                f"{name} has {len(ids)} tokens: the model takes {max_model_len} at most; "
                f"window={max_model_len} cuts prompts into pieces of that many."
            )
        step = window or len(ids)
        yield [ids[i : i + step] for i in range(0, len(ids), step)]


def _check(ids: list[int], vocab: int, what: str) -> None:
    if not ids:
        raise ConfigError(f"{what} is empty: at least one token is needed.")
    bad = next((i for i in ids if not 0 <= i < vocab), None)
    if bad is not None:
        raise ConfigError(f"{what} holds token id {bad}: ids must be from 0 to {vocab - 1}.")


class Spool:
    """Pieces of token ids kept for a second pass: in memory while they are few, then in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def keep(self, prompts: Iterable[Any]) -> Iterator[list[list[int]]]:
        """The same, remembered as they pass."""
        for prompt in prompts:
            self._file.write(np.array([len(prompt), *map(len, prompt)], np.int32).tobytes())
            self._file.write(
                np.concatenate([np.asarray(piece, np.int32) for piece in prompt]).tobytes()
            )
            yield prompt

    def again(self) -> Iterator[list[list[int]]]:
        """What was kept, from the beginning."""
        self._file.seek(0)
        while head := self._file.read(4):
            (count,) = np.frombuffer(head, np.int32)
            yield [self._ids(length) for length in self._ids(int(count))]

    def _ids(self, count: int) -> list[int]:
        return np.frombuffer(self._file.read(4 * count), np.int32).tolist()
