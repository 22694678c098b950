"""Token ids to text as they arrive: whole characters only, stopped at stop strings, constant work per token.

A token is not a piece of text. It may hold half a character (byte-level BPE), and a tokenizer of the SentencePiece
kind drops the space before the first word of whatever it decodes. So new tokens are decoded together with the few
that came before, whose share of the text is then cut off; and text that ends in U+FFFD, the sign of an unfinished
character, waits for the tokens that may finish it.

`Detokenizer` is that plus the search for stop strings, which may straddle tokens: text that could be the beginning of
one waits too. The pieces together are the decoding of all ids at once. (One exception: where a tokenizer with byte
fallback is fed bytes that are not UTF-8, or that spell U+FFFD itself, decoding at once spoils the valid characters next
to them as well, which here are long shown.)
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST = (
    4  # bytes of the longest character in UTF-8, and so the most tokens one can be spread over
)


@runtime_checkable
class Decoder(Protocol):
    """Whatever turns ids into text: the same text for the same ids, and no tidying of spaces across tokens."""

    def decode(self, ids: list[int], /) -> str: ...


class Detokenizer:
    """The text of one output, piece by piece.

    `stop` are the strings that end it; of several matches the one complete first counts, of those the longest. The text ends
    before the match, or with it if `keep_stop`.
    `context` are the last ids of the prompt, a handful, if the text is to continue the prompt's (a first word then
    keeps its space).

    After a match `stopped` is the stop string, and `tokens_kept` the number of pushed tokens up to the one that
    completed it; before, `stopped` is None and `tokens_kept` counts every token pushed.
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
        return self._matcher.found

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain; may be empty. After a stop string it always is."""
        ids = [int(token) for token in token_ids]
        steps = [[token] for token in ids] if self._matcher.stops else [ids]
        pieces = []
        for step in steps:
            if self.stopped is None and step:
                self.tokens_kept += len(step)
                pieces.append(self._matcher.push(self._characters.push(step)))
        return "".join(pieces)

    def finish(self) -> str:
        """The text still held back, now that no token follows. A character cut in half is U+FFFD."""
        return self._matcher.push(self._characters.finish()) + self._matcher.finish()


class _Characters:
    """Ids to whole characters.

    `_window` are the ids decoded each time: `_settled` of them from before, whose text is out and ended well, then
    those since. The first `_shown` characters of the window's text are out.
    """

    def __init__(self, tokenizer: Decoder, context: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._start_over(list(context))

    def _start_over(self, window: list[int], *, waiting: int = 0) -> None:
        """Go on with only `window` for context, all of its text out but the last `waiting` characters."""
        self._window = window
        self._text = self._decode(window) if window else ""
        self._shown = max(0, len(self._text) - waiting)
        self._settled = 0 if waiting else len(window)

    def push(self, ids: list[int]) -> str:
        text = self._decode(self._window + ids)
        if len(text) > self._shown and not text.endswith(UNFINISHED):
            piece = text[self._shown :]
            self._start_over(self._window[self._settled :] + ids)
            return piece
        if len(ids) > 1:
            return "".join(self.push([token]) for token in ids)
        if text == self._text and not self._decode(ids * 2):
            return (
                ""  # a special token, which shows nowhere: it may fall in the middle of a character
            )
        self._window, self._text = self._window + ids, text
        return self._certain_part()

    def _certain_part(self) -> str:
        """What is certain of a text that has nothing new, or ends unfinished."""
        waiting = len(self._text) - len(self._text.rstrip(UNFINISHED))
        if not waiting:
            self._settled = len(self._window)
            return ""
        too_long = len(self._window) - self._settled >= LONGEST
        if too_long:
            waiting = 1  # the others have had their chance: they are not characters
        piece = self._text[self._shown : len(self._text) - waiting]
        self._shown += len(piece)
        if too_long:
            self._start_over(self._window[-LONGEST:], waiting=waiting)
        return piece

    def finish(self) -> str:
        piece = self._text[self._shown :]
        self._shown = len(self._text)
        return piece


class _StopMatcher:
    """Text up to the first stop string, or to its end, holding back what may become one."""

    def __init__(self, stops: tuple[str, ...], *, keep: bool) -> None:
        self.stops, self._keep = stops, keep
        self.found: str | None = None
        self._held = ""

    def push(self, piece: str) -> str:
        if self.found is not None:
            return ""
        text = self._held + piece
        matches = [
            (start + len(stop), start, stop)
            for stop in self.stops
            if (start := text.find(stop)) >= 0
        ]
        if matches:
            end, start, self.found = min(matches)
            self._held = ""
            return text[: end if self._keep else start]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
