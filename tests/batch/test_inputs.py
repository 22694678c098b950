"""Rows from files of every format: the same rows, bad ones told apart, numbers and lines that stay what they are."""

import json

import pytest

import jfp8kv
from jfp8kv.batch import outputs
from jfp8kv.batch import parquet as batch_parquet
from jfp8kv.batch.config import File
from jfp8kv.batch.inputs import Reader, format_of
from jfp8kv.batch.journal import Done, Journal, ordered
from jfp8kv.batch.templates import RowError

ROWS = [{"word": "a", "n": 1}, {"word": 'é, "b"\nc', "n": 2}, {"word": "", "n": 3}]


def read(path, form="auto"):
    """Number, line, and fields or what is wrong, of each row."""
    found = []
    for row in Reader(File(path=str(path), format=form)):
        try:
            found.append((row.number, row.line, row.fields()))
        except RowError as error:
            found.append((row.number, row.line, str(error)))
    return found


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    assert read(path) == [(0, 1, ROWS[0]), (1, 3, ROWS[1]), (2, 5, ROWS[2])]


def test_comma_separated_values(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffword,n\r\na,1\r\n"é, ""b""\nc",2\r\n\r\n,3\r\na,1,2\r\n', newline="")
    texts = [{"word": row["word"], "n": str(row["n"])} for row in ROWS]
    assert read(path)[:3] == [(0, 2, texts[0]), (1, 3, texts[1]), (2, 6, texts[2])]
    assert read(path)[3] == (3, 7, "has 3 values, and the header names 2 fields.")


def test_a_record_that_is_no_utf8_or_no_csv_spoils_itself_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'word,n\na,1\n\xff,2\n"x"y,3\nb,4\n')
    first, second, third, fourth = (fields for _, _, fields in read(path))
    assert (first, fourth) == ({"word": "a", "n": "1"}, {"word": "b", "n": "4"})
    assert second == "is no UTF-8 text." and third.startswith("is no CSV: ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\n\nword\na\n", [(0, 4, {"word": "a"})]),
        ("", []),
        ('word,"n"x\na,1\n', "a.csv:1: the header is no CSV: "),
        ("a,b,a\n", "a.csv:1: the header names a field twice: 'a'"),
    ],
)
def test_the_header_of_a_csv_file_is_its_first_record(tmp_path, text, found):
    path = tmp_path / "a.csv"
    path.write_text(text)
    if isinstance(found, list):
        assert read(path) == found
        return
    with pytest.raises(jfp8kv.ConfigError, match=found):
        read(path)


def test_plain_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n two \n\xff\nthree")
    found = read(path)
    assert [(number, line) for number, line, _ in found] == [(0, 1), (1, 3), (2, 4), (3, 5)]
    assert [fields for _, _, fields in found[:2]] == [{"prompt": "one"}, {"prompt": " two "}]
    assert "is no UTF-8 text" in found[2][2] and found[3][2] == {"prompt": "three"}


def test_parquet_files_are_read_and_written_lazily(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"word": f"w{i}", "n": i, "tags": ["a"] * (i % 3), "score": None if i % 7 else 0.5}
        for i in range(1000)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [fields for _, _, fields in read(tmp_path / "a.parquet")] == rows
    monkeypatch.setattr(batch_parquet, "GROUP", 64)
    like = File(path=str(tmp_path / "a.parquet"))
    outputs.write(tmp_path / "b.parquet", map(outputs.line, rows), "parquet", like=like)
    assert parquet.read_table(tmp_path / "b.parquet").to_pylist() == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_file_that_is_no_parquet_or_breaks_off_is_said_to_be(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1xx")
    with pytest.raises(jfp8kv.ConfigError, match="a.parquet: cannot be read as Parquet"):
        read(path)
    parquet.write_table(
        pa.table({"a": ["x" * 50] * 1000}), path, compression="none", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    content[20_000:20_400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(jfp8kv.ConfigError, match="a.parquet: cannot be read as Parquet"):
        read(path)


def test_a_column_that_is_null_at_first_or_everywhere_is_one(tmp_path, monkeypatch):
    from pyarrow import parquet

    rows = [
        {"a": None, "error": None},
        {"a": None, "error": None},
        {"a": 1.5, "error": None, "b": "late"},
    ]
    monkeypatch.setattr(batch_parquet, "GROUP", 1)
    outputs.write(
        tmp_path / "b.parquet",
        map(outputs.line, rows),
        "parquet",
        like=File(path="a.jsonl", format="jsonl"),
    )
    assert parquet.read_table(tmp_path / "b.parquet").to_pylist() == [
        {"b": None} | row for row in rows
    ]


def test_columns_keep_types_that_json_lacks(tmp_path):
    import datetime
    from decimal import Decimal

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
    typed = {
        "small": pa.array([1, None], pa.int8()),
        "half": pa.array([0.5, 1], pa.float32()),
        "bits": pa.array([True, None]),
    }
    typed |= {
        "huge": pa.array([2**64 - 1, 0], pa.uint64()),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
    }
    typed |= {
        "fixed": pa.array([b"ab", None], pa.binary(2)),
        "wide": pa.array(["x", None], pa.large_string()),
    }
    for name, column in typed.items():
        table = table.append_column(name, column)
    parquet.write_table(table, tmp_path / "a.parquet")
    like = File(path=str(tmp_path / "a.parquet"))
    read = [row.fields() for row in Reader(like)]
    outputs.write(tmp_path / "b.parquet", map(outputs.line, read), "parquet", like=like)
    found = parquet.read_table(tmp_path / "b.parquet")
    assert found.schema == table.schema and found.to_pylist() == table.to_pylist()


def test_the_format_goes_by_the_name_and_the_first_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        'nope\n{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n'
    )
    assert format_of(File(path=str(path))) == "openai"
    path.write_text('{"custom_id": "a"}\n')
    assert format_of(File(path=str(path))) == "jsonl"
    with pytest.raises(
        jfp8kv.ConfigError,
        match="a.doc: its name says no format: give `format:`, or a name in .jsonl",
    ):
        format_of(File(path="a.doc"))
    assert format_of(File(path="a.doc", format="lines")) == "lines"


def test_a_record_is_one_line_of_json_whatever_is_in_it():
    import datetime

    odd = {
        "nan": float("nan"),
        "deep": [{"inf": float("inf")}],
        "day": datetime.date(2020, 1, 2),
        "bytes": b"\x01",
    }
    assert json.loads(outputs.line(odd)) == {
        "nan": None,
        "deep": [{"inf": None}],
        "day": "2020-01-02",
        "bytes": "01",
    }
    assert outputs.line({"a": "é\n\u2028"}) == '{"a":"é\\n\u2028"}'.encode()
    assert json.loads(outputs.line({"half": "\ud800", "nan": float("nan")})) == {
        "half": "\ud800",
        "nan": None,
    }


def test_done_rows_are_those_before_a_mark_and_those_that_overtook_it():
    done, seen = Done(1, 3), set()
    for row in (4, 1, 13, 10, 7):
        done.add(row)
        seen.add(row)
        assert all((number in done) == (number in seen) for number in range(1, 20, 3))
    assert not done._ahead


def test_a_journal_gives_back_what_was_finished_in_order(tmp_path):
    path = tmp_path / "a.partial"
    with Journal(path) as journal:
        for row in (2, 0, 3, 1):
            journal.append(
                row, b'{"n":%d}' % row, prompt_tokens=row, completion_tokens=10, ok=row != 3
            )
    assert list(ordered(path)) == [b'{"n":%d}' % row for row in range(4)]
    with Journal(path) as journal:
        totals = journal.totals
        assert (totals.rows, totals.failed, totals.prompt_tokens, totals.completion_tokens) == (
            4,
            1,
            6,
            40,
        )
        assert all(row in journal.done for row in range(4)) and 4 not in journal.done


def test_an_append_that_fails_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    import os

    path, write = tmp_path / "a.partial", os.write
    with Journal(path) as journal:
        journal.append(0, b"{}")
        before = path.read_bytes()

        def full(file, content):
            if len(content) > 10:
                return write(file, content[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(1, b"{}" * 5)
        monkeypatch.undo()
        assert path.read_bytes() == before and 1 not in journal.done
        journal.append(1, b"{}")
    assert list(ordered(path)) == [b"{}", b"{}"]
