"""Parquet output: its schema is known before the run, and tables are written in groups of rows.

From Parquet to Parquet the columns of the input are copied as Arrow columns, so types and values
that JSON lacks survive. From other inputs, the types of the columns are inferred from the whole
file before the first row runs, so that rows that do not fit one table are reported then.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.batch.config import Config
from jfp8kv.batch.requests import GENERATED_FIELDS, SCORED_FIELDS
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.log import logger
from jfp8kv.text.rows import Fields, Reader, RowError

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 8192  # per row group: the rows in memory,
GROUP_BYTES = 64 << 20  # or fewer, where the rows of the input are large
ADVICE = "`--set output.format=jsonl` writes the rows as JSON lines"


# -- schema ----------------------------------------------------------------------------------------


def output_schema(config: Config) -> "pa.Schema":
    """Return the schema of a run's output: the columns of the input and those of the results.

    Raises `ConfigError` for columns that cannot be written: of a type that Parquet lacks, of values
    that have no common type, or with the name of a result.
    """
    import pyarrow as pa

    results = _result_fields(config)
    reserved = {field.name for field in results}
    path = Path(config.input.path)
    if config.input.row_format == "parquet":
        columns = read_schema(path)
        _check_writable(columns, path)
        _warn_lost_annotations(path, columns)
    else:
        columns = _inferred_schema(config.input.reader(), reserved)
        _check_writable(columns, path)
    conflicts = reserved & set(columns.names)
    if conflicts:
        raise ConfigError(
            f"{path}: the column {min(conflicts)!r} has the name of a result: give "
            "`output.prefix`, such as 'new_'."
        )
    return pa.schema([*columns, *results], metadata=columns.metadata)


def read_schema(path: Path) -> "pa.Schema":
    """Return the schema of a Parquet file. Raises `ConfigError` if it cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}.") from None


def _result_fields(config: Config) -> "list[pa.Field]":
    """Return the columns of the results of a run."""
    import pyarrow as pa

    token = {"token_id": pa.int64(), "token": pa.string(), "logprob": pa.float64()}
    steps = pa.list_(pa.struct(token | {"top": pa.list_(pa.struct(token))}))
    types = {
        "text": pa.string(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "finish_reason": pa.string(),
        "logprob": pa.float64(),
        "logprobs": steps,
        "error": pa.struct({"line": pa.int64(), "message": pa.string()}),
    }
    names = list(GENERATED_FIELDS)
    if config.task == "score":
        names = list(SCORED_FIELDS)
        types["logprobs"] = pa.list_(pa.float64())
    else:
        sampling = config.sampling.options()
        if sampling.logprobs is None:
            names.remove("logprobs")
        if sampling.n > 1:
            for name in ("text", "completion_tokens", "finish_reason", "logprobs"):
                types[name] = pa.list_(types[name])
    return [pa.field(config.output.prefix + name, types[name]) for name in names]


def _check_writable(schema: "pa.Schema", path: Path) -> None:
    """Raise `ConfigError` for a column whose type Parquet lacks."""
    import pyarrow as pa
    from pyarrow import parquet

    for field in schema:
        table = pa.schema([field]).empty_table()
        try:
            parquet.write_table(table, pa.BufferOutputStream())
        except pa.ArrowException as error:
            raise ConfigError(
                f"{path}: the column {field.name!r} of type {field.type} cannot be written as "
                f"Parquet ({error}). {ADVICE}."
            ) from None


def _warn_lost_annotations(path: Path, schema: "pa.Schema") -> None:
    """Warn about columns with a Parquet type that Arrow lacks, such as INTERVAL and ENUM.

    Their bytes are kept, but the output does not say what they mean.
    """
    import pyarrow as pa
    from pyarrow import parquet

    empty = pa.BufferOutputStream()
    parquet.write_table(schema.empty_table(), empty)
    written = parquet.ParquetFile(pa.BufferReader(empty.getvalue()))
    with parquet.ParquetFile(path) as source:
        before = _annotations(source)
    after = _annotations(written)
    for name in before.keys() & after.keys():
        if before[name] != "NONE" and after[name] == "NONE":
            logger.warning(
                "%s: the column %s has Parquet's type %s, which pyarrow does not write: the output "
                "has its bytes, without that type.",
                path,
                name,
                before[name],
            )


def _annotations(file: Any) -> dict[str, str]:
    """Return the logical types of a Parquet file's leaf columns by path; "NONE" for none."""
    columns = [file.schema.column(number) for number in range(len(file.schema))]
    return {
        column.path: column.converted_type  # pyarrow has no name for the logical type of INTERVAL
        if column.logical_type.type == "UNKNOWN"
        else column.logical_type.type
        for column in columns
    }


def _inferred_schema(reader: Reader, reserved: set[str]) -> "pa.Schema":
    """Return a schema that all valid rows of a file fit, without the `reserved` names.

    Takes two passes over the file: for the types, and to check that every value fits them. A column
    of nulls is a column of strings.
    """
    import pyarrow as pa

    schema = pa.schema([])
    groups = 0
    for group in _fields_in_groups(reader):
        groups += 1
        names = dict.fromkeys(name for _, fields in group for name in fields)
        columns = [
            pa.field(name, _checked_column(reader.path, group, name, None).type)
            for name in names
            if name not in reserved
        ]
        try:
            schema = pa.unify_schemas([schema, pa.schema(columns)], promote_options="permissive")
        except pa.ArrowException as error:
            lines = f"{group[0][0]} to {group[-1][0]}"
            raise ConfigError(
                f"{reader.path}: lines {lines} and those before do not fit one table: {error}. "
                f"{ADVICE}."
            ) from None
    schema = pa.schema(
        [field.with_type(pa.string()) if field.type == pa.null() else field for field in schema]
    )
    if groups > 1:
        for group in _fields_in_groups(reader):
            for field in schema:
                _checked_column(reader.path, group, field.name, field.type)
    return schema


def _fields_in_groups(reader: Reader) -> Iterator[list[tuple[int, Fields]]]:
    """Yield groups of lines and fields; rows that cannot be parsed are left out."""

    def valid() -> Iterator[tuple[int, Fields]]:
        with closing(iter(reader)) as rows:
            for row in rows:
                try:
                    yield row.line, row.fields()
                except RowError:
                    continue

    rows = valid()
    while group := list(itertools.islice(rows, GROUP_ROWS)):
        yield group


def _checked_column(
    path: Path, group: Sequence[tuple[int, Fields]], name: str, kind: "pa.DataType | None"
) -> "pa.Array":
    """Return one column of a group. Raises `ConfigError` with the first line that does not fit."""
    import pyarrow as pa

    values = [fields.get(name) for _, fields in group]
    try:
        return pa.array(values, kind)
    except _conversion_errors() as error:
        fitting, failing = 0, len(values)  # numbers of rows
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            try:
                pa.array(values[:middle], kind)
                fitting = middle
            except _conversion_errors():
                failing = middle
        raise ConfigError(
            f"{path}:{group[fitting][0]}: the field {name!r} does not fit a column of one type "
            f"({error}). {ADVICE}."
        ) from None


def _conversion_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for values that do not fit a column."""
    import pyarrow as pa

    return (pa.ArrowException, ValueError, TypeError, OverflowError)


# -- tables ----------------------------------------------------------------------------------------


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
    """Write one row of each table in turn, as the shards took them from the input.

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
    except _conversion_errors() as error:
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
