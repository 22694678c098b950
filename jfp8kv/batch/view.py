"""What a run shows while it goes, on stderr: a live table on a terminal, a line now and then elsewhere, or nothing."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LINE_S = 30.0  # between two lines, where there is no terminal


@dataclass(frozen=True)
class Progress:
    """How far a run is. `share` is of all rows, as far as their number can be told; tokens are this process's; `counters` are
    the engine's, if it is here."""

    done: int
    failed: int
    share: float
    share_before: float  # of the rows that were done when this process began
    seconds: float
    prompt_tokens: float
    completion_tokens: float
    counters: dict[str, float]

    @property
    def left_s(self) -> float | None:
        """Seconds left, if the rest goes like this process's part so far."""
        gone = self.share - self.share_before
        return self.seconds * (1 - self.share) / gone if gone > 0 else None

    def figures(self) -> dict[str, str]:
        """Everything in words, by its name."""
        seconds, counters = max(self.seconds, 1e-9), self.counters
        failed = f", {self.failed:,} failed" if self.failed else ""
        into, out = self.prompt_tokens / seconds, self.completion_tokens / seconds
        shown = {
            "rows": f"{self.done:,} done ({self.share:.0%}){failed}",
            "tokens/s": f"{into:,.0f} in, {out:,.0f} out",
        }
        if capacity := counters.get("kv_bytes_capacity"):
            shown["cache"] = f"{counters['kv_bytes_used'] / capacity:.0%} used"
            shown["prefix hits"] = f"{counters['prefix_hit_tokens']:,.0f} tokens"
            shown["preemptions"] = f"{counters['preemptions']:,.0f}"
        return shown | {
            "time": f"{_clock(self.seconds)}, {'?' if self.left_s is None else _clock(self.left_s)} left"
        }


class View:
    """Shows progress as often as somebody would look, from a thread of its own, so that a row costs nothing."""

    def __init__(self, quiet: bool = False, *, line_s: float = LINE_S):
        self.shown = not quiet and sys.stderr is not None
        self._line_s = line_s

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.shown:
            sys.stderr.write(f"jfp8kv: {text}\n")
            sys.stderr.flush()

    @contextmanager
    def watching(self, progress: Callable[[], Progress]) -> Iterator[None]:
        """Show what `progress` says, again and again, while this lasts."""
        if not self.shown:
            yield
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            with Live(
                console=Console(stderr=True),
                get_renderable=lambda: _table(progress()),
                transient=True,
            ):
                yield
        else:
            over = threading.Event()
            thread = threading.Thread(target=self._lines, args=(progress, over), daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()

    def _lines(self, progress: Callable[[], Progress], over: threading.Event) -> None:
        while not over.wait(self._line_s):
            self.say("; ".join(f"{name} {value}" for name, value in progress().figures().items()))


def _table(progress: Progress) -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in progress.figures().items():
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02}"
    )
