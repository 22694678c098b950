"""Output files, written from a finished journal and renamed into place: JSONL and Parquet."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jfp8kv.batch import journal, parquet
from jfp8kv.batch.config import Config, InputFile
from jfp8kv.core.errors import ConfigError
from jfp8kv.text.rows import require_parquet


def _as_text(value: Any) -> str:
    """Return a value that JSON lacks as text: bytes as hex digits, others by `str`."""
    return value.hex() if isinstance(value, bytes) else str(value)


_JSON = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, default=_as_text, separators=(",", ":")
)


def encode(row: dict[str, Any]) -> bytes:
    """Return an output row as one line of JSON, without the newline. NaN and infinity are null."""
    try:
        text = _JSON.encode(row)
    except ValueError:
        text = _JSON.encode(_finite(row))
    # JSON can escape an unpaired surrogate; UTF-8 cannot encode it.
    return text.encode("utf-8", "backslashreplace")


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value


def format_of(config: Config) -> str:
    """Return the format of the output. Raises `ConfigError` if it does not fit the input."""
    given = config.output.format
    suffix = Path(config.output.path).suffix.lower()
    if config.input.row_format == "openai":
        if given in ("auto", "openai") and suffix != ".parquet":
            return "openai"
        raise ConfigError(
            "OpenAI batch requests get OpenAI's output format: give a name that ends in .jsonl."
        )
    if given == "openai":
        raise ConfigError("format openai needs an input of OpenAI batch requests.")
    if given != "auto":
        return given
    if suffix in (".jsonl", ".ndjson", ".parquet"):
        return "parquet" if suffix == ".parquet" else "jsonl"
    raise ConfigError(
        f"{config.output.path}: unknown suffix: give `format:`, or a name that ends in .jsonl or "
        ".parquet."
    )


def check_format(config: Config) -> None:
    """Raise unless the format of the output is known and its library installed."""
    if format_of(config) == "parquet":
        require_parquet()


def check_path(config: Config) -> None:
    """Raise unless the output can be written; called before the work, not after it."""
    path = Path(config.output.path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path}: cannot be written; give a file in a folder that exists.")
    if path.exists() and path.samefile(config.input.path):
        raise ConfigError(f"{path}: is also the input: give the output another name.")


def shard_path(output: Path, shard: list[int] | None) -> Path:
    """Return the output of a shard, such as `out.0-of-4.jsonl` for `out.jsonl`."""
    if shard is None:
        return output
    index, count = shard
    return output.with_name(f"{output.stem}.{index}-of-{count}{output.suffix}")


def write_output(config: Config, partial: Path) -> None:
    """Write the output of a finished journal. An existing file is replaced as a whole."""
    if config.output.unordered:
        rows = journal.unordered_outputs(partial)
    else:
        index, count = config.shard or (0, 1)
        rows = journal.ordered_outputs(partial, (index, count))
    path = shard_path(Path(config.output.path), config.shard)
    write(path, rows, format_of(config), like=config.input)


def write(path: Path, rows: Iterable[bytes], form: str, *, like: InputFile) -> None:
    """Write encoded rows to a temporary file, sync it to the disk and rename it to `path`.

    Args:
      path: the output.
      rows: encoded rows.
      form: "parquet", or any other format for JSON lines.
      like: a file whose column types are kept, if both files are Parquet.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        if form == "parquet":
            is_parquet = like.row_format == "parquet"
            types = parquet.column_types(Path(like.path)) if is_parquet else {}
            parquet.write(temporary, rows, types)
        else:
            _write_lines(temporary, rows)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)  # the new name must survive a power failure before the journal is gone
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, the journal needs the space
        raise


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_lines(path: Path, rows: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(row + b"\n" for row in rows)
