"""What the commands print: text to stdout as it is made, remarks to stderr."""

import sys
from collections.abc import Iterable
from typing import Any


def say(text: str) -> None:
    """One line to the user, on stderr."""
    if sys.stderr is not None:  # None when it was closed, which print would take for stdout
        print("jfp8kv: " + " ".join(text.split()), file=sys.stderr, flush=True)


def print_stream(pieces: Iterable[str], said: list[str]) -> None:
    """Print pieces of text as they come, then end the line. `said` grows by what was printed, whatever ends it."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
    finally:
        print(flush=True)


def show(found: Any) -> None:
    """A result on stdout; tables get lines and colours on a terminal alone."""
    if sys.stdout is not None and sys.stdout.isatty() and not isinstance(found, str):
        from rich.console import Console

        Console().print(found)
    else:
        print(found, flush=True)


def rate(tokens: int, seconds: float) -> str:
    """Tokens, seconds and their ratio, in words."""
    return f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
