"""Progress of a run on stderr: a live table on a terminal, a line at intervals elsewhere."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

LINE_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Progress:
    """The state of a run.

    Attributes:
      done: finished rows, of all sessions.
      failed: how many of them failed.
      fraction: the finished fraction of all rows, estimated from the input read so far.
      resumed_fraction: the fraction that was finished before this session.
      seconds: duration of this session.
      prompt_tokens, completion_tokens: tokens of this session.
      counters: counters of the engine; empty if it runs in other processes.
    """

    done: int
    failed: int
    fraction: float
    resumed_fraction: float
    seconds: float
    prompt_tokens: float
    completion_tokens: float
    counters: Mapping[str, float]

    @property
    def remaining_s(self) -> float | None:
        """The remaining time at the rate of this session; None before the first row."""
        gained = self.fraction - self.resumed_fraction
        return self.seconds * (1 - self.fraction) / gained if gained > 0 else None

    def as_text(self) -> dict[str, str]:
        """Return the lines of the display by label."""
        seconds = max(self.seconds, 1e-9)
        failed = f", {self.failed:,} failed" if self.failed else ""
        prompt_rate = self.prompt_tokens / seconds
        completion_rate = self.completion_tokens / seconds
        remaining = "?" if self.remaining_s is None else _clock(self.remaining_s)
        text = {
            "rows": f"{self.done:,} done ({self.fraction:.0%}){failed}",
            "tokens/s": f"{prompt_rate:,.0f} prompt, {completion_rate:,.0f} completion",
        }
        capacity = self.counters.get("kv_bytes_capacity")
        if capacity:
            text["cache"] = f"{self.counters['kv_bytes_used'] / capacity:.0%} used"
            text["prefix hits"] = f"{self.counters['prefix_hit_tokens']:,.0f} tokens"
            text["preemptions"] = f"{self.counters['preemptions']:,.0f}"
        text["time"] = f"{_clock(self.seconds)}, {remaining} left"
        return text


class ProgressDisplay:
    """Shows progress from a separate thread, so that rows do not wait for it.

    Args:
      quiet: show nothing.
      line_interval_s: seconds between two lines without a terminal.
    """

    def __init__(self, quiet: bool = False, *, line_interval_s: float = LINE_INTERVAL_S):
        self.visible = not quiet and sys.stderr is not None
        self._line_interval_s = line_interval_s

    def message(self, text: str) -> None:
        """Write a line."""
        if self.visible:
            sys.stderr.write(f"jfp8kv: {text}\n")
            sys.stderr.flush()

    @contextmanager
    def following(self, progress: Callable[[], Progress]) -> Iterator[None]:
        """Show the current result of `progress` for the duration of the context."""
        if not self.visible:
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
            stop = threading.Event()
            thread = threading.Thread(target=self._write_lines, args=(progress, stop), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _write_lines(self, progress: Callable[[], Progress], stop: threading.Event) -> None:
        while not stop.wait(self._line_interval_s):
            self.message("; ".join(f"{name} {text}" for name, text in progress().as_text().items()))


def _table(progress: Progress) -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, text in progress.as_text().items():
        table.add_row(f"[dim]{name}[/dim]", text)
    return table


def _clock(seconds: float) -> str:
    """Return a duration as `h:mm:ss` or `m:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
