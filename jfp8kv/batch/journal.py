"""The journal of a run: one line for each finished row, appended as the row finishes.

    {"row":17,"in":120,"out":64,"ok":true,"output":{...}}

The newline is the commit: a row is done if and only if its whole line is in the journal. A killed
process leaves at most one incomplete line, which is truncated on recovery. A damaged line, as a
power failure may leave, is skipped, and its row runs again. Rows are in the order in which they
finished; `ordered_outputs` yields them by number.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

_HEAD = re.compile(rb'\{"row":(\d+),"in":(\d+),"out":(\d+),"ok":(true|false),"output":')
_END = b"}\n"
SYNC_S = 5.0  # a power failure loses at most the rows of this time, a killed process none


@dataclass
class Totals:
    """Counts over finished rows."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt_tokens: int, completion_tokens: int, ok: bool) -> None:
        """Count one finished row."""
        self.rows += 1
        self.failed += not ok
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def __sub__(self, before: "Totals") -> "Totals":
        return Totals(
            rows=self.rows - before.rows,
            failed=self.failed - before.failed,
            prompt_tokens=self.prompt_tokens - before.prompt_tokens,
            completion_tokens=self.completion_tokens - before.completion_tokens,
        )


class CompletedRows:
    """The set of finished rows among `first`, `first + step`, ...

    Stored as a low-water mark and the rows beyond it, so memory does not grow with the file.
    """

    def __init__(self, first: int = 0, step: int = 1):
        self._next = first
        self._step = step
        self._ahead: set[int] = set()

    def add(self, row: int) -> None:
        """Add a row and advance the mark past all finished rows."""
        self._ahead.add(row)
        while self._next in self._ahead:
            self._ahead.remove(self._next)
            self._next += self._step

    def __contains__(self, row: int) -> bool:
        return row < self._next or row in self._ahead


class Journal:
    """An open journal.

    Args:
      path: the file; it is created, or recovered from an earlier process.
      shard: `(i, n)`: the run has rows i, i + n, i + 2n, ...

    Attributes:
      done: the finished rows.
      totals: their counts.
    """

    def __init__(self, path: Path, shard: tuple[int, int] = (0, 1)):
        self.path = path
        self.done = CompletedRows(*shard)
        self.totals = Totals()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = self._recover()
        self._synced = time.monotonic()

    def _recover(self) -> int:
        """Count the rows of the file, truncate it after the last whole line, return its size."""
        size = 0
        with self.path.open("rb") as file:
            for start, head, line in _lines(file):
                size = start + len(line)
                self.done.add(int(head[1]))
                self.totals.add(int(head[2]), int(head[3]), head[4] == b"true")
        os.ftruncate(self._file, size)
        return size

    def append(
        self,
        row: int,
        output: bytes,
        *,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        ok: bool = True,
    ) -> None:
        """Commit a finished row. Once this returns, the row survives the end of the process.

        Raises `OSError`, for example on a full disk, and leaves the journal unchanged.
        """
        state = "true" if ok else "false"
        counts = f'"in":{prompt_tokens},"out":{completion_tokens},"ok":{state}'
        line = f'{{"row":{row},{counts},"output":'.encode() + output + _END
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self.done.add(row)
        self.totals.add(prompt_tokens, completion_tokens, ok)
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Flush to the disk, so that committed rows survive a power failure."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unordered_outputs(path: Path) -> Iterator[bytes]:
    """Yield the output of each row, in the order in which the rows finished."""
    with path.open("rb") as file:
        for _, head, line in _lines(file):
            yield line[head.end() : -len(_END)]


def ordered_outputs(path: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[bytes]:
    """Yield the output of each row by number.

    Of rows that finished before an earlier row, only the file offsets are in memory.
    """
    row, step = shard
    ahead: dict[int, tuple[int, int]] = {}  # row: offset and length of its output
    with path.open("rb") as file, path.open("rb") as outputs:
        for start, head, line in _lines(file):
            offset = start + head.end()
            ahead[int(head[1])] = (offset, len(line) - head.end() - len(_END))
            while row in ahead:
                offset, length = ahead.pop(row)
                outputs.seek(offset)
                yield outputs.read(length)
                row += step
    assert not ahead, f"rows are missing before {sorted(ahead)[:3]}"


def _lines(file: BinaryIO) -> Iterator[tuple[int, re.Match[bytes], bytes]]:
    """Yield the offset, the parsed head and the contents of each valid line."""
    offset = 0
    for line in file:
        head = _HEAD.match(line)
        if head is not None and line.endswith(_END):
            yield offset, head, line
        offset += len(line)
