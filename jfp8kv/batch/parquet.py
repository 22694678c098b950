"""Parquet files of encoded rows, group by group."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jfp8kv.core.errors import ConfigError

GROUP = 8192  # rows that are in memory at once


def types_of(path: Path) -> dict[str, Any]:
    """Columns of a Parquet file whose types JSON lacks: rows have them as texts (dates, decimals) or hex digits (bytes)."""
    from pyarrow import parquet, types

    kinds = (types.is_date, types.is_timestamp, types.is_decimal, types.is_binary, types.is_large_binary)
    return {field.name: field.type for field in parquet.read_schema(path) if any(is_kind(field.type) for is_kind in kinds)}


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
                found = pa.Table.from_pylist([json.loads(row) for row in group]).schema
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
        schema = pa.schema([field if field.type != pa.null() else field.with_type(pa.string()) for field in schema])
        final = pa.schema([field.with_type(types.get(field.name, field.type)) for field in schema])
        with kept.open("rb") as lines, ParquetWriter(path, final) as writer:
            for group in _groups(lines):
                table = pa.Table.from_pylist([json.loads(row) for row in group], schema=schema)
                writer.write_table(pa.table([_as(table[field.name], field.type) for field in final], schema=final))
    except pa.ArrowException as error:
        raise ConfigError(f"{path.stem}: the rows fit no one table: {error}; give a name that ends in .jsonl.") from None
    finally:
        kept.unlink(missing_ok=True)


def _as(column: Any, kind: Any) -> Any:
    """A column as one of that type."""
    import pyarrow as pa

    if not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        return column.cast(kind)
    return pa.array([None if value is None else bytes.fromhex(value) for value in column.to_pylist()], kind)


def _groups(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, GROUP)):
        yield group
