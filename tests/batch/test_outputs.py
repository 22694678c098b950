"""Output files: rows encoded as JSON, and Parquet files with the columns of all rows."""

import datetime
import json
from decimal import Decimal

from jfp8kv.batch import outputs
from jfp8kv.batch import parquet as batch_parquet
from jfp8kv.batch.config import InputFile
from jfp8kv.text.rows import Reader


def write_parquet(path, rows, like):
    file = InputFile(path=str(like), format="parquet" if like.suffix == ".parquet" else "jsonl")
    outputs.write(path, map(outputs.encode, rows), "parquet", like=file)


def test_a_row_is_one_line_of_json():
    row = {
        "nan": float("nan"),
        "deep": [{"inf": float("inf")}],
        "day": datetime.date(2020, 1, 2),
        "bytes": b"\x01",
    }
    assert json.loads(outputs.encode(row)) == {
        "nan": None,
        "deep": [{"inf": None}],
        "day": "2020-01-02",
        "bytes": "01",
    }
    assert outputs.encode({"a": "é\n\u2028"}) == '{"a":"é\\n\u2028"}'.encode()
    surrogate = outputs.encode({"half": "\ud800", "nan": float("nan")})
    assert json.loads(surrogate) == {"half": "\ud800", "nan": None}


def test_parquet_rows_are_written_in_groups(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"word": f"w{i}", "n": i, "tags": ["a"] * (i % 3), "score": None if i % 7 else 0.5}
        for i in range(1000)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(batch_parquet, "GROUP_ROWS", 64)
    write_parquet(tmp_path / "b.parquet", rows, like=tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "b.parquet").to_pylist() == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_parquet_column_may_be_null_at_first_or_everywhere(tmp_path, monkeypatch):
    from pyarrow import parquet

    rows = [
        {"a": None, "error": None},
        {"a": None, "error": None},
        {"a": 1.5, "error": None, "b": "late"},
    ]
    monkeypatch.setattr(batch_parquet, "GROUP_ROWS", 1)
    write_parquet(tmp_path / "b.parquet", rows, like=tmp_path / "a.jsonl")
    found = parquet.read_table(tmp_path / "b.parquet").to_pylist()
    assert found == [{"b": None} | row for row in rows]


def test_parquet_columns_keep_types_that_json_lacks(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {
            "day": datetime.date(2020, 1, 2),
            "at": datetime.datetime(2020, 1, 2, 3, 4, 5, 678),
            "blob": b"\x00\xff",
            "big": 2**60,
            "parts": [{"a": 1}],
        },
        {"zone": datetime.datetime(2021, 5, 6, tzinfo=datetime.UTC), "price": Decimal("12.50")},
    ]
    table = pa.concat_tables(
        [pa.Table.from_pylist([row]) for row in rows], promote_options="default"
    )
    columns = {
        "small": pa.array([1, None], pa.int8()),
        "half": pa.array([0.5, 1], pa.float32()),
        "bits": pa.array([True, None]),
        "huge": pa.array([2**64 - 1, 0], pa.uint64()),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "fixed": pa.array([b"ab", None], pa.binary(2)),
        "wide": pa.array(["x", None], pa.large_string()),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    source = tmp_path / "a.parquet"
    parquet.write_table(table, source)
    fields = [row.fields() for row in Reader(source)]
    write_parquet(tmp_path / "b.parquet", fields, like=source)
    found = parquet.read_table(tmp_path / "b.parquet")
    assert found.schema == table.schema
    assert found.to_pylist() == table.to_pylist()
