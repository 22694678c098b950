"""Rows from files, read lazily: JSONL, CSV, Parquet, plain lines, OpenAI batch requests.

A row has a number, from 0 over all rows of the file, the bad ones too, and the line it begins at. What cannot be read as a row
is one whose fields raise `RowError` when they are asked for; what comes after it is read all the same.
"""

import csv
import dataclasses
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jfp8kv.batch.config import File
from jfp8kv.batch.templates import RowError
from jfp8kv.core.errors import ConfigError, NotSupported

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "lines",
}
OPENAI_KEYS = frozenset(("custom_id", "method", "url", "body"))
PARQUET_ROWS = 256  # read at a time


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the input. `line` is where it begins, from 1; of a Parquet file it is the row, from 1."""

    number: int
    line: int
    read: Callable[[], dict[str, Any]]

    def fields(self) -> dict[str, Any]:
        """Its fields by name. Raises `RowError`, saying what is wrong with it."""
        return self.read()


class Reader:
    """The rows of a file, and how far they have been read."""

    def __init__(self, file: File):
        self.path = Path(file.path)
        self.format = format_of(file)
        self._share: Callable[[], float] = lambda: 0.0

    @property
    def share(self) -> float:
        """Of the file, read so far."""
        return self._share()

    def __iter__(self) -> Generator[Row, None, None]:
        if self.format == "parquet":
            yield from self._parquet()
            return
        with self.path.open("rb") as stream:
            size = max(1, os.fstat(stream.fileno()).st_size)
            self._share = lambda: min(1.0, _position(stream, size) / size)
            yield from (
                _csv(stream)
                if self.format == "csv"
                else _by_line(stream, _LINE_READERS[self.format])
            )

    def _parquet(self) -> Iterator[Row]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                total, number = max(1, file.metadata.num_rows), 0
                for batch in file.iter_batches(PARQUET_ROWS):
                    for fields in batch.to_pylist():
                        yield Row(number, number + 1, lambda fields=fields: fields)
                        number += 1
                    self._share = lambda number=number: number / total
        except (ArrowException, ValueError) as error:
            raise ConfigError(f"{self.path}: cannot be read as Parquet: {error}.") from None


def _position(stream: BinaryIO, size: int) -> int:
    """How far a stream was read; whoever watches may find it closed."""
    try:
        return stream.tell()
    except ValueError:
        return size


def check(file: File) -> None:
    """Raise unless the file is there, its format is known, and what reads it is installed."""
    path = Path(file.path)
    if not path.is_file():
        raise ConfigError(
            f"{file.path}: {'must be a file, no folder or pipe' if path.exists() else 'no such file'}."
        )
    if format_of(file) == "parquet":
        need_pyarrow()


def need_pyarrow() -> None:
    """Raise `NotSupported` unless Parquet can be read and written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise NotSupported(
            "Parquet needs pyarrow, which is not installed: pip install 'jfp8kv[parquet]'."
        )


def format_of(file: File) -> str:
    """The format of a file's rows: what was asked for, or what its name and first row say."""
    if file.format != "auto":
        return file.format
    suffix = Path(file.path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(
            f"{file.path}: its name says no format: give `format:`, or a name in {', '.join(FORMATS)}."
        )
    found = FORMATS[suffix]
    return "openai" if found == "jsonl" and _is_openai(Path(file.path)) else found


def _is_openai(path: Path) -> bool:
    """Whether the first row that is an object is an OpenAI batch request."""
    with path.open("rb") as stream:
        for row in _by_line(stream, _json_object):
            try:
                return row.fields().keys() >= OPENAI_KEYS
            except RowError:
                continue
    return False


def _by_line(stream: BinaryIO, read: Callable[[bytes], dict[str, Any]]) -> Iterator[Row]:
    """A row for each line that is not blank."""
    number = 0
    for line, content in enumerate(stream, 1):
        if line == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        if content.strip():
            yield Row(number, line, lambda content=content: read(content))
            number += 1


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RowError(f"is no UTF-8 text: {error.reason} at byte {error.start}.") from None


def _json_object(content: bytes) -> dict[str, Any]:
    text = _text(content)
    try:
        found = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise RowError(
            f"is JSON of type {type(found).__name__}: must be an object with the row's fields."
        )
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)

_LINE_READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "jsonl": _json_object,
    "openai": _json_object,
    "lines": lambda content: {"prompt": _text(content)},
}


def _csv(stream: BinaryIO) -> Iterator[Row]:
    """A row for each record after the header, which names the fields. Bytes that are no UTF-8 spoil their record alone."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        records = csv.reader(text, strict=True)
        try:
            header = next(filter(None, records), [])
        except csv.Error as error:
            raise ConfigError(
                f"{stream.name}:{records.line_num}: the header is no CSV: {error}."
            ) from None
        if twice := {name for name in header if header.count(name) > 1}:
            raise ConfigError(
                f"{stream.name}:{records.line_num}: the header names a field twice: {min(twice)!r}."
            )
        for number, (line, read) in enumerate(_records(records, header)):
            yield Row(number, line, read)


def _records(records: Any, header: list[str]) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """The line at which each record begins, and what reads it; blank lines are none."""
    while True:
        line = records.line_num + 1
        try:
            values = next(records, None)
        except csv.Error as error:
            yield line, lambda error=error: _raise(RowError(f"is no CSV: {error}."))
            continue
        if values is None:
            return
        if values:
            yield line, lambda values=values: _record(header, values)


def _record(header: list[str], values: list[str]) -> dict[str, Any]:
    if len(values) != len(header):
        raise RowError(f"has {len(values)} values, and the header names {len(header)} fields.")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise RowError("is no UTF-8 text.") from None
    return dict(zip(header, values, strict=True))


def _raise(error: Exception) -> Any:
    raise error
