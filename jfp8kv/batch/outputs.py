"""Output files, made of a finished journal and put in place by one rename: JSONL, which OpenAI's format is too, and Parquet."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jfp8kv.batch import inputs, journal
from jfp8kv.batch.config import Config
from jfp8kv.core.errors import ConfigError

PARQUET_ROWS = 8192  # of a group, all in memory at once


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


_FORM = {"allow_nan": False, "default": _plain, "separators": (",", ":")}
_JSON, _ESCAPED = json.JSONEncoder(ensure_ascii=False, **_FORM), json.JSONEncoder(**_FORM)


def line(record: dict[str, Any]) -> bytes:
    """A record as JSON, on one line, without its end. What JSON lacks becomes what it has: dates texts, NaN null."""
    try:
        return _JSON.encode(record).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return _ESCAPED.encode(_finite(record)).encode()
    except ValueError:
        return line(_finite(record))


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
    """The output's format. Raises `ConfigError` where input and output do not go together."""
    asked, suffix = config.output.format, Path(config.output.path).suffix.lower()
    if inputs.format_of(config.input) == "openai":
        if asked in ("auto", "openai") and suffix != ".parquet":
            return "openai"
        raise ConfigError("OpenAI batch requests get OpenAI's output format: give a name that ends in .jsonl.")
    if asked == "openai":
        raise ConfigError("format openai is for OpenAI batch requests, and the input is none.")
    if asked != "auto":
        return asked
    if suffix in (".jsonl", ".ndjson", ".parquet"):
        return "parquet" if suffix == ".parquet" else "jsonl"
    raise ConfigError(f"{config.output.path}: its name says no format: give `format:`, or a name in .jsonl or .parquet.")


def check(config: Config) -> None:
    """Raise unless such an output can be made."""
    if format_of(config) == "parquet":
        inputs.need_pyarrow()
    if Path(config.output.path).resolve() == Path(config.input.path).resolve():
        raise ConfigError(f"{config.output.path}: is the input, too: give the output another name.")


def check_writable(path: Path) -> None:
    """Raise unless a file can be written there: sooner than after the work."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path}: no file can be written there; give one in a folder that exists.")


def shard_path(output: Path, shard: list[int] | None) -> Path:
    """Where a shard's output goes: `out.0-of-4.jsonl` for `out.jsonl`, so that one config serves all shards."""
    return output.with_name(f"{output.stem}.{shard[0]}-of-{shard[1]}{output.suffix}") if shard else output


def finish(config: Config, partial: Path) -> None:
    """Write the output of a finished journal: all of it is there, or what was there before."""
    shard = tuple(config.shard) if config.shard else (0, 1)
    rows = journal.outputs(partial) if config.output.unordered else journal.ordered(partial, shard)
    write(shard_path(Path(config.output.path), config.shard), rows, format_of(config))


def write(path: Path, rows: Iterable[bytes], form: str) -> None:
    """Write encoded rows to `path`, through a file beside it that takes its name once it is whole and on the disk."""
    beside = path.with_name(path.name + ".new")
    try:
        (_write_parquet if form == "parquet" else _write_lines)(beside, rows)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)  # where the disk is full it takes what the journal needs
        raise


def _write_lines(path: Path, rows: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for row in rows:
            file.write(row + b"\n")


def _write_parquet(path: Path, rows: Iterable[bytes]) -> None:
    """Groups of rows, in the columns that all of them together have: found in a first pass, as a row may lack a field."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kept = path.with_name(path.name + ".rows")
    try:
        schema = pa.schema([])
        with kept.open("wb") as file:
            for group in _groups(rows):
                file.write(b"".join(row + b"\n" for row in group))
                table = pa.Table.from_pylist([json.loads(row) for row in group])
                schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        schema = pa.schema([field if field.type != pa.null() else field.with_type(pa.string()) for field in schema])
        with kept.open("rb") as lines, ParquetWriter(path, schema) as writer:
            for group in _groups(lines):
                writer.write_table(pa.Table.from_pylist([json.loads(row) for row in group], schema=schema))
    except pa.ArrowException as error:
        raise ConfigError(f"{path.name}: the rows fit no one table: {error}; give a name that ends in .jsonl.") from None
    finally:
        kept.unlink(missing_ok=True)


def _groups(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, PARQUET_ROWS)):
        yield group
