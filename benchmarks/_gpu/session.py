"""One run on a device: its clock, what was found so far, and the file that keeps it after every part."""

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
    """What parts are given. `facts` holds device, versions, commit and rows, and is written to `path`.

    `right` says of each kernel and element whether it agreed with the oracle, so far as it was checked. `blocks` holds what
    tuning found in this run.
    """

    path: Path
    clock: Clock
    dry_run: bool
    ends: float  # by time.perf_counter()
    facts: dict[str, Any] = field(default_factory=dict)
    right: dict[tuple[str, str], bool] = field(default_factory=dict)
    blocks: dict[tuple[str, str], Any] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    failed: bool = False
    part: str = ""
    part_ends: float = 0.0

    def begin(self, part: str, share: float) -> None:
        """Start a part, which may take `share` of the time that is left."""
        now = time.perf_counter()
        self.part, self.part_ends = part, now + share * max(0.0, self.ends - now)
        console.print(f"\n[bold]{part}[/] (at most {self.part_ends - now:.0f} s)")

    def left(self) -> float:
        """Seconds left to the part."""
        return self.part_ends - time.perf_counter()

    @contextlib.contextmanager
    def within(self, share: float) -> Iterator[None]:
        """Inside, the part has only so much of its time."""
        ends = self.part_ends
        self.part_ends = time.perf_counter() + share * self.left()
        try:
            yield
        finally:
            self.part_ends = ends

    def row(self, what: str, **figures: Any) -> Row:
        """Keep a row and print it."""
        row = {"part": self.part, "what": what} | figures
        self.facts.setdefault("rows", []).append(row)
        shown = ", ".join(
            f"{name} {_short(value)}" for name, value in figures.items() if value is not None
        )
        console.print(f"  {what}: {shown}", highlight=False, soft_wrap=True, markup=False)
        return row

    def rows(self, part: str, **wanted: Any) -> list[Row]:
        """The rows of a part that have these values, and a time or rate of their own."""
        found = [
            row
            for row in self.facts.get("rows", [])
            if row["part"] == part and "skipped" not in row
        ]
        return [
            row for row in found if all(row.get(name) == value for name, value in wanted.items())
        ]

    def each(self, items: Iterable[Any], name: Callable[[Any], str] = str) -> Iterator[Any]:
        """The items that the part has time for, if one takes as long as the longest so far; the others become rows."""
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
        """Whatever goes wrong inside becomes a row; with `ours` the run has failed."""
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
        """Book an error, a share of what is allowed: wrong once is wrong for good, and with `ours` the run has failed."""
        right = error <= 1
        self.right[kernel, element] = self.right.get((kernel, element), True) and right
        self.row(what, error=float(error), right=right)
        self.failed |= ours and not right

    def may_time(self, kernel: str, element: str, what: str, /, **figures: Any) -> bool:
        """Whether the kernel was found right; a row says why not."""
        right = self.right.get((kernel, element))
        if not right:
            self.row(
                what, **figures, skipped="not checked" if right is None else "wrong: not timed"
            )
        return bool(right)

    def end_processes(self) -> None:
        """End whatever still runs beside this run."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.communicate()

    def save(self) -> None:
        """Write what there is so far, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.facts, indent=1, default=str) + "\n", encoding="utf-8")
        beside.replace(self.path)


def results_path(folder: Path, device: str) -> Path:
    """`DEVICE-DATE.json`, numbered where there is one already."""
    stem = f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{datetime.date.today().isoformat()}"
    names = (f"{stem}{f'-{n}' if n > 1 else ''}.json" for n in range(1, 1000))
    return next(folder / name for name in names if not (folder / name).exists())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
