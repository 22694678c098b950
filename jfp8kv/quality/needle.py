"""A needle-in-a-haystack test that small models can pass: copy tokens from earlier in the prompt.

A prompt has `length` tokens of the user's text, with the needle inserted at a depth and repeated at
the end. The first tokens of the repetition are the cue, which a model that can look back continues
as before. Recall is the fraction of the tokens after the cue that are the most likely ones given
the tokens before them. So one forward pass scores a prompt, and nothing is generated.

The needle's tokens are drawn from those of the text, all different where there are enough, with a
fixed seed; each length and depth has a different needle. The first token of the text stays first,
because it may be a BOS token, which models attend to.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jfp8kv.core.errors import ConfigError

DEFAULT_LENGTHS = (256, 1024)
DEPTHS = (0.0, 0.5, 1.0)
NEEDLE_TOKENS = 24
CUE_TOKENS = 8
SEED = 20_240
MIN_LENGTH = 2 * NEEDLE_TOKENS + 1


@dataclasses.dataclass(frozen=True)
class Needle:
    """A prompt of `length` tokens. Recall is measured from position `first` on."""

    ids: list[int]
    length: int
    depth: float
    first: int

    @property
    def position(self) -> int:
        """Where the needle starts: 1 at depth 0, directly before its repetition at depth 1."""
        return _position(self.length, self.depth)


def _position(length: int, depth: float) -> int:
    return 1 + round(depth * (length - 2 * NEEDLE_TOKENS - 1))


def create_needles(
    text: np.ndarray, lengths: Sequence[int], depths: Sequence[float]
) -> list[Needle]:
    """Return a needle for each length and depth, length by length.

    `text` is token ids; it is repeated where it is too short.
    """
    vocabulary = np.unique(text)
    unique = len(vocabulary) >= NEEDLE_TOKENS
    pairs = [(length, depth) for length in lengths for depth in depths]
    needles = []
    for number, (length, depth) in enumerate(pairs):
        rng = np.random.default_rng([SEED, number])
        needle = rng.choice(vocabulary, NEEDLE_TOKENS, replace=not unique)
        hay = np.resize(text, length - 2 * NEEDLE_TOKENS)
        position = _position(length, depth)
        ids = np.concatenate([hay[:position], needle, hay[position:], needle])
        needles.append(Needle(ids.tolist(), length, depth, length - NEEDLE_TOKENS + CUE_TOKENS))
    return needles


def allowed_lengths(lengths: Sequence[int] | None, max_tokens: int) -> tuple[int, ...]:
    """Return the prompt lengths for a context of `max_tokens` tokens.

    None is 256 and 1024, limited to `max_tokens`. Raises `ConfigError` for a length beyond
    `max_tokens`.
    """
    if lengths is None:
        limited = (min(length, max_tokens) for length in DEFAULT_LENGTHS)
        return tuple(dict.fromkeys(length for length in limited if length >= MIN_LENGTH))
    for length in lengths:
        if length > max_tokens:
            raise ConfigError(
                f"needle_lengths={list(lengths)!r}: each must be at most {max_tokens}, the context "
                "length; () skips the test."
            )
    return tuple(lengths)
