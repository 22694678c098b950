"""Parquet files of encoded rows, group by group."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jfp8kv.core.errors import ConfigError

GROUP = 8192  # rows that are in memory at once


def types_of(path: Path) -> dict[str, Any]:
    """The types of a Parquet file's plain columns. Those with parts are left out, and what JSON and a cast cannot give back."""
    import pyarrow as pa
    from pyarrow import parquet, types

    kinds = (
        types.is_boolean,
        types.is_integer,
        types.is_float32,
        types.is_float64,
        types.is_string,
        types.is_large_string,
    )
    kinds += (types.is_decimal, types.is_date, types.is_timestamp, *_binary())
    return {
        field.name: field.type
        for field in parquet.read_schema(path)
        if any(is_kind(field.type) for is_kind in kinds)
        or field.type == pa.dictionary(pa.int32(), pa.string())
    }


def write(path: Path, rows: Iterable[bytes], types: Mapping[str, Any]) -> None:
    """Write encoded rows, in the columns that all of them together have; those in `types` become of these again.

    It takes two passes, with the rows in a file between them, as a row may lack a column that a later one has. Raises
    `ConfigError` for rows that fit no one table.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kept = path.with_name(path.name + ".rows")
    try:
        schema = pa.schema([])
        with kept.open("wb") as file:
            for group in _groups(rows):
                file.write(b"".join(row + b"\n" for row in group))
                schema = pa.unify_schemas(
                    [schema, _table(group, types).schema], promote_options="permissive"
                )
        schema = pa.schema(
            [field if field.type != pa.null() else field.with_type(pa.string()) for field in schema]
        )
        final = dict(zip(schema.names, schema.types, strict=True))
        with kept.open("rb") as lines, ParquetWriter(path, schema) as writer:
            for group in _groups(lines):
                writer.write_table(_table(group, final, names=schema.names))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the rows fit no one table ({error}); `--set output.format=jsonl` makes them JSON lines without running them again"
        ) from None
    finally:
        kept.unlink(missing_ok=True)


def _table(
    rows: Iterable[bytes], types: Mapping[str, Any], names: Iterable[str] | None = None
) -> Any:
    """Encoded rows as a table of these columns (None: all that they have), of the types that are known."""
    import pyarrow as pa

    read = [json.loads(row) for row in rows]
    names = dict.fromkeys(name for row in read for name in row) if names is None else names
    return pa.table(
        {name: _column([row.get(name) for row in read], types.get(name)) for name in names}
    )


def _column(values: list[Any], kind: Any) -> Any:
    """Values as JSON has them, as a column of that type (None: what they look like)."""
    import pyarrow as pa

    if kind is None:
        return pa.array(values)
    if any(is_kind(kind) for is_kind in _binary()):
        return pa.array([None if value is None else bytes.fromhex(value) for value in values], kind)
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.array(values, pa.string()).cast(kind)
    return pa.array(values, kind)


def _binary() -> tuple[Any, ...]:
    from pyarrow import types

    return (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)


def _groups(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, GROUP)):
        yield group
