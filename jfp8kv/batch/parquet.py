"""Parquet files, written one group of rows at a time."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jfp8kv.core.errors import ConfigError

GROUP_ROWS = 8192  # per row group: the rows in memory


def column_types(path: Path) -> dict[str, Any]:
    """Return the types of the flat columns that can be restored from JSON by a cast."""
    import pyarrow as pa
    from pyarrow import parquet, types

    predicates = (
        types.is_boolean,
        types.is_integer,
        types.is_float32,
        types.is_float64,
        types.is_string,
        types.is_large_string,
        types.is_decimal,
        types.is_date,
        types.is_timestamp,
        *_binary_predicates(),
    )
    categories = pa.dictionary(pa.int32(), pa.string())
    return {
        field.name: field.type
        for field in parquet.read_schema(path)
        if field.type == categories or any(matches(field.type) for matches in predicates)
    }


def write(path: Path, rows: Iterable[bytes], types: Mapping[str, Any]) -> None:
    """Write encoded rows with the union of their columns; `types` fixes the types of some.

    Takes two passes, with the rows in a temporary file in between, since a row may lack a column
    that a later one has. Raises `ConfigError` for rows that do not fit one table.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    spooled = path.with_name(path.name + ".rows")
    try:
        schema = pa.schema([])
        with spooled.open("wb") as file:
            for group in _groups(rows):
                file.write(b"".join(row + b"\n" for row in group))
                found = _table(group, types).schema
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
        schema = pa.schema(
            [field.with_type(pa.string()) if field.type == pa.null() else field for field in schema]
        )
        final = dict(zip(schema.names, schema.types, strict=True))
        with spooled.open("rb") as lines, ParquetWriter(path, schema) as writer:
            for group in _groups(lines):
                writer.write_table(_table(group, final, names=schema.names))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the rows do not fit one table ({error}); `--set output.format=jsonl` writes them as "
            "JSON lines without running them again"
        ) from None
    finally:
        spooled.unlink(missing_ok=True)


def _table(
    rows: Iterable[bytes], types: Mapping[str, Any], names: Iterable[str] | None = None
) -> Any:
    """Return encoded rows as a table of the columns `names`; None: of all columns they have."""
    import pyarrow as pa

    decoded = [json.loads(row) for row in rows]
    if names is None:
        names = dict.fromkeys(name for row in decoded for name in row)
    columns = {name: [row.get(name) for row in decoded] for name in names}
    return pa.table({name: _column(values, types.get(name)) for name, values in columns.items()})


def _column(values: list[Any], kind: Any) -> Any:
    """Return JSON values as a column of type `kind`; None: of the type inferred by pyarrow."""
    import pyarrow as pa

    if kind is None:
        return pa.array(values)
    if any(matches(kind) for matches in _binary_predicates()):
        return pa.array([None if value is None else bytes.fromhex(value) for value in values], kind)
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.array(values, pa.string()).cast(kind)
    return pa.array(values, kind)


def _binary_predicates() -> tuple[Any, ...]:
    from pyarrow import types

    return (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)


def _groups(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    iterator = iter(rows)
    while group := list(itertools.islice(iterator, GROUP_ROWS)):
        yield group
