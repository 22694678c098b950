"""A needle in a haystack that small models can find: tokens in random order somewhere in a text, to be copied at its end.

A prompt is `length` tokens of the user's own text, with the needle put in at a depth and said again at the end. Its first
tokens there are the cue: seeing them, a model that can look back continues as before. Recall is the share of the tokens after
the cue that are the likeliest ones, each given those before it, so that one pass scores a prompt and no text need be made.

The needle's tokens are drawn from the texts' own, all different where there are enough, with a seed that is always the same;
each length and depth has a needle of its own. The text's first token stays the first: models lean on it (it may be a BOS).
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError

LENGTHS, DEPTHS = (256, 1024), (0.0, 0.5, 1.0)
NEEDLE_TOKENS, CUE_TOKENS = 24, 8
SEED = 20_240
SHORTEST = 2 * NEEDLE_TOKENS + 1


@dataclasses.dataclass(frozen=True)
class Needle:
    """A prompt of `length` tokens whose last ones, from position `first` on, are to be recalled."""

    ids: list[int]
    length: int
    depth: float
    first: int

    @property
    def place(self) -> int:
        """Where the needle stands: 1 at depth 0, right before it is asked for at depth 1."""
        return 1 + round(self.depth * (self.length - 2 * NEEDLE_TOKENS - 1))


def needles(text: np.ndarray, lengths: Sequence[int], depths: Sequence[float]) -> list[Needle]:
    """A needle for each length and depth, length by length, in `text` (token ids, repeated where it is too short)."""
    own = np.unique(text)
    made = []
    for number, (length, depth) in enumerate(
        (length, depth) for length in lengths for depth in depths
    ):
        rng = np.random.default_rng([SEED, number])
        needle = rng.choice(own, NEEDLE_TOKENS, replace=len(own) < NEEDLE_TOKENS)
        hay = np.resize(text, length - 2 * NEEDLE_TOKENS)
        made.append(
            _hidden(hay, needle, Needle([], length, depth, length - NEEDLE_TOKENS + CUE_TOKENS))
        )
    return made


def _hidden(hay: np.ndarray, needle: np.ndarray, at: Needle) -> Needle:
    ids = np.concatenate([hay[: at.place], needle, hay[at.place :], needle])
    return dataclasses.replace(at, ids=ids.tolist())


def lengths_for(given: Any, most: int = sys.maxsize) -> tuple[int, ...]:
    """The lengths asked for, None being 256 and 1024 as far as `most` allows. Raises `ConfigError` for what cannot be."""
    if given is None:
        return tuple(
            dict.fromkeys(min(length, most) for length in LENGTHS if min(length, most) >= SHORTEST)
        )
    lengths = _sequence("needle_lengths", given)
    for length in lengths:
        if (
            isinstance(length, bool)
            or not isinstance(length, int | np.integer)
            or not SHORTEST <= length <= most
        ):
            limit = "" if most == sys.maxsize else f", to {most}, the most that the model takes"
            raise ConfigError(
                f"needle_lengths={given!r}: each must be from {SHORTEST} tokens, twice a needle and one more{limit}; () leaves "
                "the task out."
            )
    return tuple(int(length) for length in lengths)


def depths_for(given: Any) -> tuple[float, ...]:
    """The depths asked for. Raises `ConfigError` for one outside 0 to 1."""
    depths = _sequence("needle_depths", given)
    for depth in depths:
        if (
            isinstance(depth, bool)
            or not isinstance(depth, int | float | np.number)
            or not 0 <= depth <= 1
        ):
            raise ConfigError(
                f"needle_depths={given!r}: each must be from 0, the beginning of the text, to 1, its end."
            )
    return tuple(float(depth) for depth in depths)


def _sequence(name: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ConfigError(f"{name}={given!r}: must be a list of numbers; () leaves the task out.")
    return tuple(given)
