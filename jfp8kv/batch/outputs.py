"""Output files, made of a finished journal and put in place by one rename: JSONL, which OpenAI's format is too, and Parquet."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jfp8kv.batch import inputs, journal, parquet
from jfp8kv.batch.config import Config, File
from jfp8kv.core.errors import ConfigError


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain, separators=(",", ":"))


def line(record: dict[str, Any]) -> bytes:
    """A record as JSON, on one line, without its end. What JSON lacks becomes what it has: dates texts, NaN null."""
    try:
        text = _JSON.encode(record)
    except ValueError:
        text = _JSON.encode(_finite(record))
    return text.encode(
        "utf-8", "backslashreplace"
    )  # half a surrogate pair: JSON can escape it, UTF-8 cannot hold it


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
        raise ConfigError(
            "OpenAI batch requests get OpenAI's output format: give a name that ends in .jsonl."
        )
    if asked == "openai":
        raise ConfigError("format openai is for OpenAI batch requests, and the input is none.")
    if asked != "auto":
        return asked
    if suffix in (".jsonl", ".ndjson", ".parquet"):
        return "parquet" if suffix == ".parquet" else "jsonl"
    raise ConfigError(
        f"{config.output.path}: its name says no format: give `format:`, or a name in .jsonl or .parquet."
    )


def check(config: Config) -> None:
    """Raise unless such an output can be made."""
    if format_of(config) == "parquet":
        inputs.need_pyarrow()


def check_place(config: Config) -> None:
    """Raise unless a file can be written there: sooner than after the work."""
    path = Path(config.output.path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"{path}: no file can be written there; give one in a folder that exists."
        )
    if path.exists() and path.samefile(config.input.path):
        raise ConfigError(f"{path}: is the input, too: give the output another name.")


def shard_path(output: Path, shard: list[int] | None) -> Path:
    """Where a shard's output goes: `out.0-of-4.jsonl` for `out.jsonl`, so that one config serves all shards."""
    return (
        output.with_name(f"{output.stem}.{shard[0]}-of-{shard[1]}{output.suffix}")
        if shard
        else output
    )


def finish(config: Config, partial: Path) -> None:
    """Write the output of a finished journal: all of it is there, or what was there before."""
    shard = tuple(config.shard) if config.shard else (0, 1)
    rows = journal.outputs(partial) if config.output.unordered else journal.ordered(partial, shard)
    write(
        shard_path(Path(config.output.path), config.shard),
        rows,
        format_of(config),
        like=config.input,
    )


def write(path: Path, rows: Iterable[bytes], form: str, *, like: File) -> None:
    """Write encoded rows to `path`, through a file beside it that takes its name once it is whole and on the disk.

    Columns of a Parquet file are of the types that they have in `like`, if that is one, too.
    """
    beside = path.with_name(path.name + ".new")
    try:
        if form == "parquet":
            types = parquet.types_of(Path(like.path)) if inputs.format_of(like) == "parquet" else {}
            parquet.write(beside, rows, types)
        else:
            _write_lines(beside, rows)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)  # where the disk is full it takes what the journal needs
        raise


def _sync_folder(folder: Path) -> None:
    """A new name outlives the computer's going down, before the journal is given up for it."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_lines(path: Path, rows: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for row in rows:
            file.write(row + b"\n")
