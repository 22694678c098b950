"""Rows from files, read lazily: JSONL, CSV, Parquet, plain lines, OpenAI batch requests.

Batch runs and the command line read their data here, so the same file gives them the same prompts.
A row has a number, from 0 over all rows of the file, and the line where it begins. Reading the
fields of an invalid row raises `RowError`; the rows after it are not affected.
"""

import contextlib
import csv
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, NoReturn, TypeAlias

from jfp8kv.core.errors import ConfigError, NotSupported
from jfp8kv.core.file_contents import describe_placeholder
from jfp8kv.text.chat import ChatOptions
from jfp8kv.text.prompts import is_conversation, with_chat_options

Fields: TypeAlias = dict[str, Any]
RowFormat: TypeAlias = Literal["jsonl", "csv", "parquet", "lines", "openai"]

FORMATS: dict[str, RowFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "lines",
}
OPENAI_KEYS = frozenset(("custom_id", "method", "url", "body"))
PROMPT_FIELDS = ("prompt", "messages", "text")  # the first one that a row has is its prompt
CHAT_FIELDS = ("tools", "documents", "chat_template_kwargs")  # options of a row's conversation
PARQUET_ROWS = 256  # rows that are read at a time


class RowError(ConfigError):
    """A row that cannot be run. The run continues with the other rows."""


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
      number: index of the row in the file, invalid rows included.
      line: line where the row begins, from 1; in a Parquet file the row, from 1.
      read: parses the row.
    """

    number: int
    line: int
    read: Callable[[], Fields]

    def fields(self) -> Fields:
        """Return the fields by name. Raises `RowError` for a row that cannot be parsed."""
        return self.read()


class Reader:
    """The rows of a file, and how much of it has been read."""

    def __init__(self, path: str | os.PathLike[str], format: RowFormat | Literal["auto"] = "auto"):
        self.path = Path(path)
        self.format = format_of(path, format)
        self._stream: BinaryIO | None = None
        self._fraction = 0.0

    @property
    def fraction(self) -> float:
        """The fraction of the file that has been read."""
        if self._stream is None:
            return self._fraction
        try:
            size = os.fstat(self._stream.fileno()).st_size
            return min(1.0, self._stream.tell() / max(1, size))
        except ValueError:  # closed: all of it was read
            return 1.0

    def __iter__(self) -> Generator[Row, None, None]:
        if self.format == "parquet":
            yield from self._parquet_rows()
            return
        with self.path.open("rb") as stream:
            self._stream = stream
            if self.format == "csv":
                yield from _csv_rows(stream)
            else:
                parse = _parse_line if self.format == "lines" else _parse_json
                yield from _line_rows(stream, parse)

    def _parquet_rows(self) -> Iterator[Row]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        number = 0
        try:
            with ParquetFile(self.path) as file:
                total = max(1, file.metadata.num_rows)
                _check_column_names(self.path, file.schema_arrow.names)
                for batch in file.iter_batches(PARQUET_ROWS):
                    columns = [_python_values(column) for column in batch.columns]
                    names = batch.schema.names
                    for values in zip(*columns, strict=True):
                        fields = dict(zip(names, values, strict=True))
                        yield Row(number, number + 1, partial(dict, fields))
                        number += 1
                    self._fraction = number / total
        except (ArrowException, ValueError) as error:
            raise ConfigError(f"{self.path}: cannot be read as Parquet: {error}.") from None


def check(path: str | os.PathLike[str], format: RowFormat | Literal["auto"] = "auto") -> None:
    """Raise unless the file exists, has a known format, and the library for it is installed."""
    if not Path(path).is_file():
        problem = "must be a regular file" if Path(path).exists() else "no such file"
        raise ConfigError(f"{path}: {problem}.")
    is_text = Path(path).suffix.lower() == ".txt"
    found = describe_placeholder(Path(path), web_pages=not is_text)
    if found is not None:
        raise ConfigError(f"{path}: {found}.")
    if format_of(path, format) == "parquet":
        require_parquet()
        _check_parquet(Path(path))


def _check_parquet(path: Path) -> None:
    """Raise `ConfigError` for a file that is not Parquet or has two columns of one name."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    try:
        names = read_schema(path).names
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}.") from None
    _check_column_names(path, names)


def _check_column_names(path: Path, names: list[str]) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ConfigError(f"{path}: has two columns of the name {min(repeated)!r}: rename one.")


def require_parquet() -> None:
    """Raise `NotSupported` unless pyarrow is installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise NotSupported(
            "Parquet needs pyarrow, which is not installed: pip install 'jfp8kv[parquet]'."
        )


def format_of(
    path: str | os.PathLike[str], format: RowFormat | Literal["auto"] = "auto"
) -> RowFormat:
    """Return the format of a file: the given one, or the one of its suffix and first row."""
    if format != "auto":
        return format
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(
            f"{path}: unknown suffix: give a format, or a name that ends in {', '.join(FORMATS)}."
        )
    found = FORMATS[suffix]
    return "openai" if found == "jsonl" and _is_openai(Path(path)) else found


def prompt_of(
    fields: Fields,
    field: str | None = None,
    *,
    hint: str,
    chat_fields: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return the prompt of a row: its `field`, or the first of `PROMPT_FIELDS` that it has.

    A conversation gets the chat options of the row: its fields named in `CHAT_FIELDS`.

    Args:
      fields: the fields of the row.
      field: the name of the field with the prompt.
      hint: ends the message for a row without one: how to name the field.
      chat_fields: chat options of all rows, which those of the row override.

    Raises `RowError` for a row without a prompt, or with invalid chat options.
    """
    names = PROMPT_FIELDS if field is None else (field,)
    for name in names:
        if name in fields:
            return _with_chat_fields(fields[name], fields, chat_fields)
    found = ", ".join(map(repr, fields)) or "no fields"
    raise RowError(f"no field {' or '.join(map(repr, names))}; the row has {found}: {hint}.")


def _with_chat_fields(prompt: Any, fields: Fields, chat_fields: Mapping[str, Any]) -> Any:
    given = dict(chat_fields)
    if is_conversation(prompt):
        given |= {name: fields[name] for name in CHAT_FIELDS if fields.get(name) is not None}
    if not given:
        return prompt
    try:
        return with_chat_options([prompt], ChatOptions(**given))[0]
    except ConfigError as error:
        raise RowError(str(error)) from None


def _is_openai(path: Path) -> bool:
    """Return whether the first valid row of a JSONL file is an OpenAI batch request."""
    with path.open("rb") as stream:
        for row in _line_rows(stream, _parse_json):
            try:
                return row.fields().keys() >= OPENAI_KEYS
            except RowError:
                continue
    return False


# -- lines: JSONL, OpenAI requests, plain text -----------------------------------------------------


def _line_rows(stream: BinaryIO, parse: Callable[[bytes], Fields]) -> Iterator[Row]:
    """Yield a row for each line that is not blank."""
    number = 0
    for line, content in enumerate(stream, 1):
        if line == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        if content.strip():
            yield Row(number, line, partial(parse, content))
            number += 1


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8: {error.reason} at byte {error.start}.") from None


def _parse_line(content: bytes) -> Fields:
    return {"prompt": _decode(content)}


def _parse_json(content: bytes) -> Fields:
    text = _decode(content)
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"invalid JSON: {error}.") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RowError(f"JSON of type {kind}: must be an object with the fields of the row.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


# -- CSV -------------------------------------------------------------------------------------------


def _csv_rows(stream: BinaryIO) -> Iterator[Row]:
    """Yield a row for each record after the header, which names the fields.

    Invalid UTF-8 is an error of its record only, not of the file.
    """
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] = []
        try:
            while not header:
                record = _next_record(reader)
                if record is None:
                    return
                header = record
        except csv.Error as error:
            where = f"{stream.name}:{reader.line_num}"
            raise ConfigError(f"{where}: the header is invalid CSV: {error}.") from None
        duplicates = {name for name in header if header.count(name) > 1}
        if duplicates:
            where = f"{stream.name}:{reader.line_num}"
            raise ConfigError(f"{where}: the header has the field {min(duplicates)!r} twice.")
        for number, (line, read) in enumerate(_csv_records(reader, header)):
            yield Row(number, line, read)


def _csv_records(reader: Any, header: list[str]) -> Iterator[tuple[int, Callable[[], Fields]]]:
    """Yield the first line of each record and a function that parses it; skip blank lines."""
    while True:
        line = reader.line_num + 1
        try:
            record = _next_record(reader)
        except csv.Error as error:
            yield line, partial(_refuse, f"invalid CSV: {error}.")
            continue
        if record is None:
            return
        if record:
            yield line, partial(_parse_record, header, record)


def _next_record(reader: Any) -> list[str] | None:
    """Return the next record, None at the end of the file."""
    with _unlimited_csv_fields():
        return next(reader, None)


@contextlib.contextmanager
def _unlimited_csv_fields() -> Iterator[None]:
    """Lift the `csv` module's limit of 128 KiB per field, which is global to the process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parse_record(header: list[str], record: list[str]) -> Fields:
    if len(record) != len(header):
        raise RowError(f"has {len(record)} values, but the header has {len(header)} fields.")
    try:
        "".join(record).encode()
    except UnicodeEncodeError:
        raise RowError("invalid UTF-8.") from None
    return dict(zip(header, record, strict=True))


def _refuse(message: str) -> NoReturn:
    raise RowError(message)


# -- Parquet ---------------------------------------------------------------------------------------


def _python_values(column: Any) -> list[Any]:
    """Return the values of an Arrow column; those that Python's types lack as text.

    Such values are times with nanoseconds, dates and durations out of Python's range, and invalid
    UTF-8, whose bytes are escaped. A structure that has a name twice becomes a list of pairs.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        values = [_python_value(scalar) for scalar in column]
    return values


def _python_value(scalar: Any) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        pass
    match scalar:
        case pa.StructScalar():
            names = [field.name for field in scalar.type]
            values = [_python_value(scalar[number]) for number in range(len(names))]
            pairs = list(zip(names, values, strict=True))
            return dict(pairs) if len(set(names)) == len(names) else pairs
        case pa.MapScalar():
            entries = scalar.values
            return [(_python_value(each[0]), _python_value(each[1])) for each in entries]
        case pa.ListScalar() | pa.LargeListScalar() | pa.FixedSizeListScalar():
            return [_python_value(each) for each in scalar.values]
        case pa.ListViewScalar() | pa.LargeListViewScalar():
            return [_python_value(each) for each in scalar.values]
        case pa.DictionaryScalar() | pa.ExtensionScalar():
            return _python_value(scalar.value)
        case pa.StringScalar() | pa.LargeStringScalar() | pa.StringViewScalar():
            return scalar.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    return scalar.cast(pa.string()).as_py()
