"""The schema of a Parquet output, which is known before the run.

From Parquet to Parquet it has the columns of the input. From other inputs, the types of the columns
are inferred from the whole file, so that rows that do not fit one table are reported before the
first one runs.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.batch.config import Config
from jfp8kv.batch.requests import GENERATED_FIELDS, SCORED_FIELDS
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.log import logger
from jfp8kv.text.rows import Fields, Reader, RowError

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 8192  # rows in memory while types are inferred
ADVICE = "`--set output.format=jsonl` writes the rows as JSON lines"


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

    A column of nulls is a column of strings. A second pass over the file checks the columns whose
    groups of rows have different types, such as integers and floats.
    """
    import pyarrow as pa

    schema = pa.schema([])
    inferred: dict[str, set[pa.DataType]] = {}
    for group in _fields_in_groups(reader):
        names = dict.fromkeys(name for _, fields in group for name in fields)
        columns = [
            pa.field(name, _checked_column(reader.path, group, name, None).type)
            for name in names
            if name not in reserved
        ]
        for column in columns:
            inferred.setdefault(column.name, set()).add(column.type)
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
    mixed = [field for field in schema if inferred[field.name] - {field.type, pa.null()}]
    if mixed:
        for group in _fields_in_groups(reader):
            for field in mixed:
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
    except conversion_errors() as error:
        fitting, failing = 0, len(values)  # numbers of rows
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            try:
                pa.array(values[:middle], kind)
                fitting = middle
            except conversion_errors():
                failing = middle
        raise ConfigError(
            f"{path}:{group[fitting][0]}: the field {name!r} does not fit a column of one type "
            f"({error}). {ADVICE}."
        ) from None


def conversion_errors() -> tuple[type[Exception], ...]:
    """Return the errors that pyarrow raises for values that do not fit a column."""
    import pyarrow as pa

    return (pa.ArrowException, ValueError, TypeError, OverflowError)
