"""Incremental detokenization: whole characters only, up to a stop string, constant work per token.

A token is not a piece of text. It may end inside a character (byte-level BPE), and tokenizers of
the SentencePiece kind drop the space before the first word they decode. So new tokens are decoded
together with a few tokens before them, whose text is then cut off. Text that ends in U+FFFD, the
sign of an incomplete character, waits for the next tokens.

`Detokenizer` adds the search for stop strings, which may span tokens: text that may be the start of
a stop string waits as well. The pieces joined are the decoding of all ids at once, with one
exception: if a tokenizer with byte fallback gets bytes that are not valid UTF-8, or that spell
U+FFFD itself, decoding at once also replaces the valid characters next to them, which were already
emitted here.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
MAX_CHARACTER_TOKENS = 4  # a character has at most 4 bytes in UTF-8


@runtime_checkable
class Decoder(Protocol):
    """Decodes token ids: deterministic, and without cleaning up spaces between tokens."""

    def decode(self, ids: list[int], /) -> str:
        """Return the text of token ids. Incomplete characters become U+FFFD."""
        ...


class Detokenizer:
    """The text of one output, in pieces.

        detokenizer = Detokenizer(tokenizer, stop=["\\n\\n"], context=prompt_ids[-4:])
        text = "".join(detokenizer.push(ids) for ids in steps) + detokenizer.finish()

    Args:
      tokenizer: decodes token ids.
      stop: strings that end the text. The first complete match counts, and the longest of several.
      keep_stop: whether the text ends after the match instead of before it.
      context: the last few ids of the prompt, so that the first word keeps its space.

    Attributes:
      stopped: the stop string that matched, or None.
      tokens_kept: the number of tokens pushed, up to the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Iterable[str] = (),
        *,
        keep_stop: bool = False,
        context: Sequence[int] = (),
    ) -> None:
        self._characters = _Characters(tokenizer, context)
        self._matcher = _StopMatcher(tuple(stop), keep=keep_stop)
        self.tokens_kept = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that matched, or None."""
        return self._matcher.found

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete. It is empty after a stop string."""
        ids = [int(token) for token in token_ids]
        steps = [[token] for token in ids] if self._matcher.stops else [ids]
        pieces = []
        for step in steps:
            if self.stopped is None and step:
                self.tokens_kept += len(step)
                pieces.append(self._matcher.push(self._characters.push(step)))
        return "".join(pieces)

    def finish(self) -> str:
        """Return the remaining text, when no token follows. An incomplete character is U+FFFD."""
        return self._matcher.push(self._characters.finish()) + self._matcher.finish()


class _Characters:
    """Turns ids into whole characters.

    `tokenizers.decoders.DecodeStream` is not used: it has no end of stream, never emits bytes that
    are not valid UTF-8 and decodes all of them again for each token, and accepts `tokenizers`
    tokenizers only.

    `_window` are the ids that are decoded each time. The text of the first `_settled` of them was
    emitted and ended with a whole character. The first `_emitted` characters of the window's text
    were emitted.
    """

    def __init__(self, tokenizer: Decoder, context: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._text = ""
        self._emitted = 0
        self._settled = 0
        self._restart(list(context))

    def push(self, ids: list[int]) -> str:
        """Return the characters that these ids complete."""
        text = self._decode(self._window + ids)
        if len(text) > self._emitted and not text.endswith(INCOMPLETE):
            piece = text[self._emitted :]
            self._restart(self._window[self._settled :] + ids)
            return piece
        if len(ids) > 1:
            return "".join(self.push([token]) for token in ids)
        if text == self._text and not self._decode(ids * 2):
            return ""  # a special token, which has no text and may come inside a character
        self._window = self._window + ids
        self._text = text
        return self._complete_part()

    def finish(self) -> str:
        """Return the remaining text."""
        piece = self._text[self._emitted :]
        self._emitted = len(self._text)
        return piece

    def _restart(self, window: list[int], *, waiting: int = 0) -> None:
        """Reduce the context to `window`. All of its text but `waiting` characters was emitted."""
        self._window = window
        self._text = self._decode(window) if window else ""
        self._emitted = max(0, len(self._text) - waiting)
        self._settled = 0 if waiting else len(window)

    def _complete_part(self) -> str:
        """Return the complete characters of a text that has nothing new or ends incomplete."""
        waiting = len(self._text) - len(self._text.rstrip(INCOMPLETE))
        if not waiting:
            self._settled = len(self._window)
            return ""
        too_long = len(self._window) - self._settled >= MAX_CHARACTER_TOKENS
        if too_long:
            waiting = 1  # only the last can still become a character: the others are invalid bytes
        piece = self._text[self._emitted : len(self._text) - waiting]
        self._emitted += len(piece)
        if too_long:
            self._restart(self._window[-MAX_CHARACTER_TOKENS:], waiting=waiting)
        return piece


class _StopMatcher:
    """Passes text on up to the first stop string. Text that may start a stop string waits."""

    def __init__(self, stops: tuple[str, ...], *, keep: bool) -> None:
        self.stops = stops
        self.found: str | None = None
        self._keep = keep
        self._waiting = ""

    def push(self, piece: str) -> str:
        """Return the text that cannot be part of a stop string. Empty after a match."""
        if self.found is not None:
            return ""
        text = self._waiting + piece
        starts = {stop: text.find(stop) for stop in self.stops}
        matches = [(at + len(stop), at, stop) for stop, at in starts.items() if at >= 0]
        if matches:
            end, start, self.found = min(matches)
            self._waiting = ""
            return text[: end if self._keep else start]
        emitted = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self._waiting = text[emitted:]
        return text[:emitted]

    def finish(self) -> str:
        """Return the text that waits."""
        waiting, self._waiting = self._waiting, ""
        return waiting


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
