"""Output of the commands: results on stdout, everything else on stderr."""

import sys
from collections.abc import Iterable


def say(text: str) -> None:
    """Print one line to the user, on stderr."""
    if sys.stderr is not None:  # closed: print would write to stdout instead
        print("jfp8kv: " + " ".join(text.split()), file=sys.stderr, flush=True)


def print_stream(pieces: Iterable[str], printed: list[str]) -> None:
    """Print pieces of text as they arrive, append each to `printed`, and end the line.

    `printed` is complete also when the stream is interrupted.
    """
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            printed.append(piece)
    finally:
        print(flush=True)


def show(result: object) -> None:
    """Print a result on stdout; tables have lines and colours on a terminal only."""
    if sys.stdout is not None and sys.stdout.isatty() and not isinstance(result, str):
        from rich.console import Console

        Console().print(result)
    else:
        print(result, flush=True)


def rate(tokens: int, seconds: float) -> str:
    """Return tokens, seconds and their ratio as text."""
    return f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
