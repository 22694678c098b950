"""The journal of a run: a line for each finished row, appended as it finishes. What is in it is done; nothing else is.

    {"row":17,"in":120,"out":64,"ok":true,"output":{...}}

The newline is the commit. A process that is killed leaves at most one line without it, which the next one cuts off. A line that
is none, as a computer that lost power may leave it, is passed over, and its row is not done. Rows stand in the order in which
they finished; `ordered` reads them in that of their numbers.
"""

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_HEAD = re.compile(rb'\{"row":(\d+),"in":(\d+),"out":(\d+),"ok":(true|false),"output":')
_END = b"}\n"
SYNC_S = 5.0  # at most so much is lost when the computer, not the process, goes down


@dataclasses.dataclass
class Totals:
    """What finished rows add up to."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt_tokens: int, completion_tokens: int, ok: bool) -> None:
        self.rows += 1
        self.failed += not ok
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def __sub__(self, before: "Totals") -> "Totals":
        return Totals(
            *(
                now - then
                for now, then in zip(
                    dataclasses.astuple(self), dataclasses.astuple(before), strict=True
                )
            )
        )


class Done:
    """Numbers of finished rows, of `first`, `first + step`, ...: all before a mark, and those that overtook it."""

    def __init__(self, first: int = 0, step: int = 1):
        self._next = first
        self._step = step
        self._ahead: set[int] = set()

    def add(self, row: int) -> None:
        self._ahead.add(row)
        while self._next in self._ahead:
            self._ahead.remove(self._next)
            self._next += self._step

    def __contains__(self, row: int) -> bool:
        return row < self._next or row in self._ahead


class Journal:
    """An open journal: `done` are its rows, `totals` counts them; `shard` says which rows there are, as in a config."""

    def __init__(self, path: Path, shard: tuple[int, int] = (0, 1)):
        self.path = path
        self.done = Done(*shard)
        self.totals = Totals()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = self._recover()
        self._synced = time.monotonic()

    def _recover(self) -> int:
        """Read what is there and cut off what follows the last whole line; bytes that stay."""
        good = 0
        with self.path.open("rb") as file:
            for start, head, line in _lines(file):
                good = start + len(line)
                self.done.add(int(head[1]))
                self.totals.add(int(head[2]), int(head[3]), head[4] == b"true")
        os.ftruncate(self._file, good)
        return good

    def append(
        self,
        row: int,
        output: bytes,
        *,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        ok: bool = True,
    ) -> None:
        """Book a finished row: when this returns, it outlives the process.

        Raises `OSError` (the disk is full, say) with the journal as it was before.
        """
        state = "true" if ok else "false"
        head = (
            f'{{"row":{row},"in":{prompt_tokens},"out":{completion_tokens},"ok":{state},"output":'
        )
        line = head.encode() + output + _END
        try:
            written = os.write(self._file, line)
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
        """What was appended outlives the computer's going down."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def outputs(path: Path) -> Iterator[bytes]:
    """The output of each row, in the order in which they finished."""
    with path.open("rb") as file:
        for _, head, line in _lines(file):
            yield line[head.end() : -len(_END)]


def ordered(path: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[bytes]:
    """The output of each row, by number. Of rows that overtook others only their places are in memory."""
    coming, step = shard
    ahead: dict[int, tuple[int, int]] = {}  # row: where its output begins, bytes
    with path.open("rb") as file, path.open("rb") as again:
        for start, head, line in _lines(file):
            ahead[int(head[1])] = (start + head.end(), len(line) - head.end() - len(_END))
            while coming in ahead:
                begin, length = ahead.pop(coming)
                again.seek(begin)
                yield again.read(length)
                coming += step
    assert not ahead, f"rows are missing before {sorted(ahead)[:3]}"


def _lines(file: BinaryIO) -> Iterator[tuple[int, re.Match[bytes], bytes]]:
    """Where each whole line begins, its head, the line; what is none is passed over."""
    at = 0
    for line in file:
        head = _HEAD.match(line)
        if head is not None and line.endswith(_END):
            yield at, head, line
        at += len(line)
