"""Files of texts: plain text, or JSONL records that hold a text, a prompt or messages."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jfp8kv.core.errors import ConfigError

FIELDS = ("text", "prompt", "messages")  # of a JSONL record, the first there is


def check(path: Path, name: str, given: str) -> None:
    """Raise `ConfigError` unless `path`, given as `given` for argument `name`, is a file."""
    if not path.is_file():
        raise ConfigError(f"{given}: no such file. {name} is a text file or a .jsonl file.")


def check_writable(path: Path, name: str, given: str) -> None:
    """Raise `ConfigError` unless a file can be written at `path`, given as `given` for argument `name`: sooner than after the
    work."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(
            f"{name} {given}: no file can be written there; give one in a folder that exists."
        )


def check_field(field: str | None, *paths: Path) -> None:
    """Raise `ConfigError` for a field where none of the files has records."""
    if field is not None and not any(map(is_jsonl, paths)):
        given = " and ".join(map(str, paths))
        verb = "is" if len(paths) == 1 else "are"
        raise ConfigError(
            f"--field {field}: belongs to records, in a file that ends in .jsonl; {given} {verb} text."
        )


def is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def texts(path: Path, *, field: str | None = None, whole: bool) -> Iterator[Any]:
    """The texts of a file, read line by line: a JSONL record each, or a line of text each; `whole`: a text file is one text.

    Raises `ConfigError` for what is no UTF-8 or no such record, by line.
    """
    try:
        if not is_jsonl(path) and whole:
            if text := path.read_bytes().decode("utf-8-sig"):
                yield text
            return
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    line = line.removesuffix("\n").removesuffix("\r")
                    yield _record(line, field, f"{path}:{number}") if is_jsonl(path) else line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error.reason}.") from error


def _record(line: str, field: str | None, where: str) -> Any:
    """The text in one JSONL record."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON ({error}).") from error
    wanted = FIELDS if field is None else (field,)
    found = next((name for name in wanted if isinstance(record, dict) and name in record), None)
    if found is None:
        there = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
        raise ConfigError(
            f"{where}: has no {' or '.join(map(repr, wanted))}, but {there}; name the field with --field."
        )
    return record[found]
