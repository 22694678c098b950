"""Data files of the commands: prompts from rows, or the whole text of a file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jfp8kv.core.errors import ConfigError
from jfp8kv.text.rows import FORMATS, Reader, RowError, RowFormat, check, prompt_of

HELP = "a text file, or a .jsonl, .csv or .parquet file of rows"
FIELD_HELP = "the field of a row with the prompt (default: prompt, messages or text)"


def check_data(path: str, argument: str) -> None:
    """Raise `ConfigError` unless `path`, given as `argument`, is a file that can be read."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file. {argument} is {HELP}.")
    check(path, _format(path))


def check_field(field: str | None, *paths: str) -> None:
    """Raise `ConfigError` for a field if no file has rows with fields."""
    if field is not None and all(_format(path) == "lines" for path in paths):
        verb = "is a text file" if len(paths) == 1 else "are text files"
        raise ConfigError(
            f"--field {field}: names a field of a row, in a .jsonl, .csv or .parquet file; "
            f"{' and '.join(paths)} {verb}."
        )


def check_writable(path: str, argument: str) -> None:
    """Raise `ConfigError` unless a file can be written at `path`, given as `argument`."""
    target = Path(path)
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(
            f"{argument} {path}: cannot be written; give a file in an existing folder."
        )


def prompts(path: str, *, field: str | None = None, whole: bool = False) -> Iterator[Any]:
    """Yield the prompt of each row; with `whole`, a text file is one prompt.

    Raises `ConfigError`, with the line, for invalid UTF-8, an invalid row and a missing field.
    """
    if whole and _format(path) == "lines":
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: invalid UTF-8: {error.reason}.") from error
        if text:
            yield text
        return
    for row in Reader(path, _format(path)):
        try:
            yield prompt_of(row.fields(), field, hint="name the field with --field")
        except RowError as error:
            raise ConfigError(f"{path}:{row.line}: {error}") from None


def _format(path: str) -> RowFormat:
    """Return the format of a file; any name without a suffix of rows is a text file."""
    return FORMATS.get(Path(path).suffix.lower(), "lines")
