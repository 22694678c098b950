"""Output files, written from a finished journal and renamed into place: JSONL and Parquet."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.batch import journal, parquet, parquet_schema
from jfp8kv.batch.config import Config
from jfp8kv.core.errors import ConfigError
from jfp8kv.text.rows import require_parquet

if TYPE_CHECKING:
    import pyarrow as pa


def _as_text(value: Any) -> str:
    """Return a value without a JSON type as text: bytes as hex digits, other types by `str`."""
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
    """Raise unless the output can be written. It is checked before the work, not after it."""
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


def output_schema(config: Config) -> "pa.Schema | None":
    """Return the schema of a Parquet output, or None for another format.

    It is determined before the run, so that a mistake is found early.

    Raises `ConfigError` for rows that do not fit one table.
    """
    return parquet_schema.output_schema(config) if format_of(config) == "parquet" else None


def write_output(config: Config, partial: Path, schema: "pa.Schema | None") -> None:
    """Write the output of a finished journal. An existing file is replaced as a whole.

    Args:
      config: the config of the run.
      partial: the journal.
      schema: from `output_schema`.
    """
    index, count = config.shard or (0, 1)
    shard = (index, count)
    path = shard_path(Path(config.output.path), config.shard)
    is_table = schema is not None and config.input.row_format == "parquet"
    if config.output.unordered and not is_table:  # the columns of a table are in its order
        rows = journal.unordered_outputs(partial)
    else:
        rows = journal.ordered_outputs(partial, shard)
    with replaced(path) as temporary:
        if schema is None:
            _write_lines(temporary, rows)
        elif is_table:
            source = Path(config.input.path)
            parquet.write_columns(temporary, source, map(json.loads, rows), schema, shard)
        else:
            parquet.write_rows(temporary, map(json.loads, rows), schema)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path. When the block succeeds, the file is synced and renamed to `path`."""
    temporary = path.with_name(path.name + ".new")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)  # the new name must be on disk before the journal is removed
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
    """Write encoded rows as lines."""
    with path.open("wb") as file:
        file.writelines(row + b"\n" for row in rows)
