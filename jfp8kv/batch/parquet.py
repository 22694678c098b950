"""Write Parquet outputs in groups of rows.

From Parquet to Parquet the columns of the input are copied as Arrow columns, so types and values
that JSON lacks survive.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.batch.parquet_schema import ADVICE, conversion_errors, read_schema
from jfp8kv.core.errors import ConfigError
from jfp8kv.text.rows import Fields

if TYPE_CHECKING:
    import pyarrow as pa

# Limits of a row group, whose rows are in memory.
GROUP_ROWS = 8192
GROUP_BYTES = 64 << 20


def write_rows(path: Path, rows: Iterable[Fields], schema: "pa.Schema") -> None:
    """Write rows of JSON values as a table of `schema`."""
    from pyarrow.parquet import ParquetWriter

    iterator = iter(rows)
    with _writing(), ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(iterator, GROUP_ROWS)):
            writer.write_table(_table(group, schema))


def write_columns(
    path: Path, source: Path, rows: Iterable[Fields], schema: "pa.Schema", shard: tuple[int, int]
) -> None:
    """Write the columns of a Parquet file, unchanged, and those of the results.

    Args:
      path: the output.
      source: the input.
      rows: the results of the rows of the shard, in the order of the input. Only the columns that
        the input lacks are read from them.
      schema: from `output_schema`.
      shard: `(i, n)`: the output has rows i, i + n, i + 2n, ... of the input.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, ParquetWriter

    first, step = shard
    iterator = iter(rows)
    number = 0  # of the first row of a group
    with _writing(), ParquetFile(source) as file, ParquetWriter(path, schema) as writer:
        columns = set(file.schema_arrow.names)
        results = pa.schema([field for field in schema if field.name not in columns])
        for group in _groups(file, _group_rows(file)):
            table = _take(group, range((first - number) % step, group.num_rows, step))
            number += group.num_rows
            added = _table(list(itertools.islice(iterator, table.num_rows)), results)
            assert added.num_rows == table.num_rows, "the journal lacks rows"
            for field, column in zip(results, added.columns, strict=True):
                table = table.append_column(field, column)
            writer.write_table(table)


def interleave(path: Path, parts: Sequence[Path]) -> None:
    """Write one row of each table in turn, which is the order of the input.

    Raises `ConfigError` for tables with different columns.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, ParquetWriter

    schema = read_schema(parts[0])
    for part in parts[1:]:
        if not read_schema(part).equals(schema):
            raise ConfigError(f"{part}: has other columns than {parts[0]}: run the shards again.")
    with ExitStack() as stack:
        stack.enter_context(_writing())
        files = [stack.enter_context(ParquetFile(part)) for part in parts]
        writer = stack.enter_context(ParquetWriter(path, schema))
        rows = max(1, min(map(_group_rows, files)) // len(files))
        for groups in itertools.zip_longest(*(_groups(file, rows) for file in files)):
            tables = [group for group in groups if group is not None]
            writer.write_table(_take(pa.concat_tables(tables), _interleaved(tables)))


def _interleaved(tables: "Sequence[pa.Table]") -> list[int]:
    """Return the row numbers of concatenated tables that take one row of each in turn."""
    ranges = []
    start = 0
    for table in tables:
        ranges.append(range(start, start + table.num_rows))
        start += table.num_rows
    rounds = itertools.zip_longest(*ranges)
    return [row for rows in rounds for row in rows if row is not None]


@contextmanager
def _writing() -> Iterator[None]:
    """Raise `ConfigError` for rows that do not fit the table; the run reports them at its start."""
    try:
        yield
    except conversion_errors() as error:
        raise ConfigError(
            f"the rows do not fit one table ({error}); {ADVICE} without running them again"
        ) from None


def _table(rows: Sequence[Fields], schema: "pa.Schema") -> "pa.Table":
    """Return the columns of `schema` from rows of JSON values."""
    import pyarrow as pa

    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        try:
            column = pa.array(values, field.type)
        except UnicodeEncodeError:  # an unpaired surrogate, quoted in an error message
            column = pa.array(map(_encodable, values), field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _encodable(value: Any) -> Any:
    """Return JSON values with unpaired surrogates escaped."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {key: _encodable(inner) for key, inner in value.items()}
        case list():
            return [_encodable(inner) for inner in value]
    return value


def _group_rows(file: Any) -> int:
    """Return the number of rows of a Parquet file to have in memory at a time."""
    metadata = file.metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    row_bytes = max(1, sum(sizes) // max(1, metadata.num_rows))
    return max(1, min(GROUP_ROWS, GROUP_BYTES // row_bytes))


def _groups(file: Any, rows: int) -> "Iterator[pa.Table]":
    """Yield tables of exactly `rows` rows of a Parquet file; the last one may have fewer."""
    import pyarrow as pa

    rest = file.schema_arrow.empty_table()
    for batch in file.iter_batches(rows):
        rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
        while rest.num_rows >= rows:
            yield rest.slice(0, rows)
            rest = rest.slice(rows)
    if rest.num_rows:
        yield rest


def _take(table: "pa.Table", rows: Sequence[int]) -> "pa.Table":
    """Return the given rows of a table, in that order."""
    import pyarrow as pa

    if rows == range(table.num_rows):
        return table
    try:
        return table.take(pa.array(rows, pa.int64()))
    except pa.ArrowNotImplementedError:  # string_view and binary_view
        return pa.concat_tables([table.slice(row, 1) for row in rows] or [table.slice(0, 0)])
