"""Prompts as windows of token ids, one prompt at a time."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TypeAlias, cast

import numpy as np

from jfp8kv.core.errors import CapacityError, ConfigError
from jfp8kv.models.params import Params
from jfp8kv.text.prompts import FORMS, Prompt, PromptLike, as_list, check_token_ids, encode

SPOOL_BYTES = 32 * 2**20  # token ids kept in memory before they are written to a temporary file

Prompts: TypeAlias = PromptLike | Iterable[Prompt]
"""One prompt, several, or an iterable that is consumed one prompt at a time."""
Windows: TypeAlias = list[list[int]]
"""The token ids of one prompt: one window, or several of equal length and a shorter last one."""


def iterate_prompts(prompts: Prompts, name: str = "prompts") -> tuple[Iterable[Prompt], int | None]:
    """Return the prompts to iterate over and their number, None for an iterable without a length.

    An iterable that is not a list is consumed one prompt at a time and never stored.

    Raises `ConfigError` for a type that is not a prompt and contains none. The message calls the
    argument `name`.
    """
    is_array = hasattr(prompts, "__array__")
    if isinstance(prompts, bytes | Mapping) or not (hasattr(prompts, "__iter__") or is_array):
        raise ConfigError(
            f"{name} of type {type(prompts).__name__}: must be {FORMS}, or an iterable of prompts."
        )
    if is_array or isinstance(prompts, Sequence):
        listed = as_list(cast(PromptLike, prompts))
        return listed, len(listed)
    return cast(Iterable[Prompt], prompts), len(prompts) if isinstance(prompts, Sized) else None


def split_prompts(
    prompts: Iterable[Prompt],
    params: Params,
    *,
    max_model_len: int,
    window: int | None,
    name: str = "prompt",
) -> Iterator[Windows]:
    """Yield the token ids of each prompt, whole or split into windows of `window` tokens.

    Raises:
      ConfigError: a prompt that is empty, of an unknown form, or has an id outside the vocabulary.
      CapacityError: without a window, a prompt longer than `max_model_len`.
    """
    for number, prompt in enumerate(prompts):
        label = f"{name} {number}"
        ids = encode(prompt, params.tokenizer, what=label).ids
        check_token_ids(ids, params.config.vocab, params.tokenizer, what=label)
        if window is None and len(ids) > max_model_len:
            raise CapacityError(
                f"{label} has {len(ids)} tokens: the model takes {max_model_len} at most; "
                f"window={max_model_len} splits prompts into windows of that length."
            )
        step = window or len(ids)
        yield [ids[i : i + step] for i in range(0, len(ids), step)]


class TokenSpool:
    """Records token ids for a second pass, in memory or, beyond 32 MiB, in a temporary file."""

    def __init__(self) -> None:
        # Closed by __exit__.
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115

    def __enter__(self) -> "TokenSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record(self, prompts: Iterable[Windows]) -> Iterator[Windows]:
        """Yield the prompts and record them."""
        for windows in prompts:
            header = np.array([len(windows), *map(len, windows)], np.int32)
            self._file.write(header.tobytes())
            for window in windows:
                self._file.write(np.asarray(window, np.int32).tobytes())
            yield windows

    def replay(self) -> Iterator[Windows]:
        """Yield the recorded prompts in order."""
        self._file.seek(0)
        while header := self._file.read(4):
            (count,) = np.frombuffer(header, np.int32)
            lengths = self._read_ids(int(count))
            yield [self._read_ids(length) for length in lengths]

    def _read_ids(self, count: int) -> list[int]:
        ids: list[int] = np.frombuffer(self._file.read(4 * count), np.int32).tolist()
        return ids
