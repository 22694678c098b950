"""State of one run on a device: its clock, its results so far, and the results file."""

import contextlib
import datetime
import json
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from benchmarks._common import console
from benchmarks._gpu.timing import Clock

Row = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results"


@dataclass
class Session:
    """State that the parts of a run share.

    Attributes:
      path: the results file.
      clock: times calls.
      dry_run: run everything on a CPU with tiny shapes, and measure nothing.
      ends: when the run must end, by `time.perf_counter`.
      facts: device, versions, commit and rows: the content of the results file.
      correct: whether each checked kernel and element type agreed with its reference.
      blocks: block sizes that this run found by tuning.
      processes: child processes by peer.
      failed: whether a kernel was wrong or raised.
      part: the current part.
      part_ends: when the current part must end.
    """

    path: Path
    clock: Clock
    dry_run: bool
    ends: float
    facts: dict[str, Any] = field(default_factory=dict)
    correct: dict[tuple[str, str], bool] = field(default_factory=dict)
    blocks: dict[tuple[str, str], Any] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    failed: bool = False
    part: str = ""
    part_ends: float = 0.0

    def begin(self, part: str, share: float) -> None:
        """Start a part, which may take `share` of the remaining time."""
        now = time.perf_counter()
        self.part = part
        self.part_ends = now + share * max(0.0, self.ends - now)
        console.print(f"\n[bold]{part}[/] (at most {self.part_ends - now:.0f} s)")

    def left(self) -> float:
        """Return the remaining seconds of the part."""
        return self.part_ends - time.perf_counter()

    @contextlib.contextmanager
    def limited_time(self, share: float) -> Iterator[None]:
        """Limit the part to `share` of its remaining time inside the context."""
        ends = self.part_ends
        self.part_ends = time.perf_counter() + share * self.left()
        try:
            yield
        finally:
            self.part_ends = ends

    def row(self, what: str, **figures: Any) -> Row:
        """Record a row and print it."""
        row = {"part": self.part, "what": what} | figures
        self.facts.setdefault("rows", []).append(row)
        shown = ", ".join(
            f"{name} {_short(value)}" for name, value in figures.items() if value is not None
        )
        console.print(f"  {what}: {shown}", highlight=False, soft_wrap=True, markup=False)
        return row

    def rows(self, part: str, **wanted: Any) -> list[Row]:
        """Return the rows of a part that have these values and were not skipped."""
        found = [
            row
            for row in self.facts.get("rows", [])
            if row["part"] == part and "skipped" not in row
        ]
        return [
            row for row in found if all(row.get(name) == value for name, value in wanted.items())
        ]

    def each(self, items: Iterable[Any], name: Callable[[Any], str] = str) -> Iterator[Any]:
        """Yield items while there is time for one as long as the longest; record the others."""
        longest = 0.0
        for item in items:
            if self.left() < longest:
                self.row(name(item), skipped="no time left")
                continue
            began = time.perf_counter()
            yield item
            longest = max(longest, time.perf_counter() - began)

    @contextlib.contextmanager
    def guarded(self, what: str, *, ours: bool = True, **figures: Any) -> Iterator[None]:
        """Record exceptions as rows. Those of our code (`ours`) fail the run."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.row(what, **figures, skipped=reason)
            if ours:
                self.failed = True
                console.print(escape(traceback.format_exc(limit=-4)), style="dim")

    def judge(
        self, kernel: str, element: str, what: str, error: float, *, ours: bool = True
    ) -> None:
        """Record an error, as a fraction of the bound.

        A kernel is correct if all its errors are at most 1. Wrong kernels of ours fail the run.
        """
        correct = error <= 1
        self.correct[kernel, element] = self.correct.get((kernel, element), True) and correct
        self.row(what, error=float(error), correct=correct)
        self.failed |= ours and not correct

    def may_time(self, kernel: str, element: str, what: str, /, **figures: Any) -> bool:
        """Return whether the kernel was checked and is correct. Otherwise record why not."""
        correct = self.correct.get((kernel, element))
        if not correct:
            reason = "not checked" if correct is None else "wrong: not timed"
            self.row(what, **figures, skipped=reason)
        return bool(correct)

    def end_processes(self) -> None:
        """Kill child processes that are still running."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.communicate()

    def save(self) -> None:
        """Write the results so far, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.facts, indent=1, default=str) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def results_path(folder: Path, device: str) -> Path:
    """Return the path of a new file `DEVICE-DATE.json`, numbered if there is one already."""
    device_name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{device_name}-{datetime.date.today().isoformat()}"
    names = (f"{stem}-{n}.json" if n > 1 else f"{stem}.json" for n in range(1, 1000))
    return next(folder / name for name in names if not (folder / name).exists())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
