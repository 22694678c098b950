"""Output files: rows encoded as JSON, and Parquet files with the columns of all rows."""

import datetime
import json

from pyarrow import parquet

from jfp8kv.batch import outputs, parquet_schema
from jfp8kv.batch import parquet as batch_parquet


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


def write_table(job, rows):
    """Run `rows` to a Parquet output; return it."""
    job.write(out="out.parquet")
    job.rows(rows)
    job.run()
    return parquet.read_table(job.output)


def test_parquet_rows_are_written_in_groups(job, monkeypatch):
    monkeypatch.setattr(batch_parquet, "GROUP_ROWS", 64)
    rows = [
        {"word": f"w{i}", "n": i, "tags": ["a"] * (i % 3), "score": None if i % 7 else 0.5}
        for i in range(1000)
    ]
    assert write_table(job, rows).select([*rows[0]]).to_pylist() == rows
    assert parquet.ParquetFile(job.output).metadata.num_row_groups == 16


def test_a_parquet_column_may_be_null_at_first_or_everywhere(job, monkeypatch):
    monkeypatch.setattr(parquet_schema, "GROUP_ROWS", 1)
    monkeypatch.setattr(batch_parquet, "GROUP_ROWS", 1)
    rows = [
        {"word": "x", "a": None, "nothing": None},
        {"word": "x", "a": None, "nothing": None},
        {"word": "x", "a": 1.5, "nothing": None, "b": "late"},
    ]
    found = write_table(job, rows).select(["word", "a", "nothing", "b"])
    assert found.to_pylist() == [{"b": None} | row for row in rows]
    assert [str(kind) for kind in found.schema.types] == ["string", "double", "string", "string"]
