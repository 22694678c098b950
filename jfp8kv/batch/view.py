"""What a run shows while it goes, on stderr: a live table on a terminal, a line now and then elsewhere, or nothing."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LINE_S = 30.0  # between two lines, where there is no terminal
REDRAW_S = 0.25


@dataclass(frozen=True)
class Progress:
    """How far a run is. `share` is of the input; `rows` and tokens are of this process, `done` and `failed` of all."""

    done: int
    failed: int
    rows: int
    prompt_tokens: int
    completion_tokens: int
    share: float
    share_before: float  # of the input that was done when this process began
    seconds: float
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
        shown = {
            "rows": f"{self.done:,} done ({self.share:.0%}){failed}",
            "tokens/s": f"{self.prompt_tokens / seconds:,.0f} in, {self.completion_tokens / seconds:,.0f} out",
        }
        if capacity := counters.get("kv_bytes_capacity"):
            shown["cache"] = f"{counters['kv_bytes_used'] / capacity:.0%} used"
            shown["prefix hits"] = f"{counters['prefix_hit_tokens']:,.0f} tokens"
            shown["preemptions"] = f"{counters['preemptions']:,.0f}"
        return shown | {"time": f"{_clock(self.seconds)}, {'?' if self.left_s is None else _clock(self.left_s)} left"}


class View:
    """Shows progress as often as somebody would look. `progress` is asked when something is shown, not at each row."""

    def __init__(self, quiet: bool = False):
        self._shown = not quiet and sys.stderr is not None
        self._every = LINE_S
        self._live: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> "View":
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
            self._every = REDRAW_S
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: Callable[[], Progress]) -> None:
        """Show it, if it is time to."""
        if self._shown and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._show(progress().figures())

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._shown:
            sys.stderr.write(f"jfp8kv: {text}\n")
            sys.stderr.flush()

    def _show(self, figures: dict[str, str]) -> None:
        if self._live is None:
            self.say("; ".join(f"{name} {value}" for name, value in figures.items()))
            return
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, value in figures.items():
            table.add_row(f"[dim]{name}[/dim]", value)
        self._live.update(table, refresh=True)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
