"""The row reader that batch runs and the command line share."""

import json

import pytest

from jfp8kv.core.errors import ConfigError
from jfp8kv.text.rows import Reader, RowError, check, format_of, prompt_of

ROWS = [{"word": "a", "n": 1}, {"word": 'é, "b"\nc', "n": 2}, {"word": "", "n": 3}]


def read(path, form="auto"):
    """Return number, line, and fields or the error, of each row."""
    found = []
    for row in Reader(path, form):
        try:
            found.append((row.number, row.line, row.fields()))
        except RowError as error:
            found.append((row.number, row.line, str(error)))
    return found


def test_jsonl_rows_have_numbers_and_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    assert read(path) == [(0, 1, ROWS[0]), (1, 3, ROWS[1]), (2, 5, ROWS[2])]


def test_csv_rows_are_named_by_the_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffword,n\r\na,1\r\n"é, ""b""\nc",2\r\n\r\n,3\r\na,1,2\r\n', newline="")
    texts = [{"word": row["word"], "n": str(row["n"])} for row in ROWS]
    assert read(path)[:3] == [(0, 2, texts[0]), (1, 3, texts[1]), (2, 6, texts[2])]
    assert read(path)[3] == (3, 7, "has 3 values, but the header has 2 fields.")


def test_an_invalid_row_does_not_affect_the_rows_after_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n{"a": NaN}\n[1]\n{"a": 2}\n')
    assert [fields for _, _, fields in read(path)] == [
        {"a": 1},
        "invalid UTF-8: invalid start byte at byte 0.",
        "invalid JSON: NaN is not a JSON number.",
        "JSON of type list: must be an object with the fields of the row.",
        {"a": 2},
    ]


def test_parquet_rows_are_read_in_order(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(i, i + 1, row) for i, row in enumerate(ROWS)]
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="b.parquet: cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_the_format_comes_from_the_suffix_and_the_first_row(tmp_path):
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    (tmp_path / "a.jsonl").write_text(json.dumps(request))
    (tmp_path / "b.jsonl").write_text("{}")
    found = [format_of(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.txt", "d.CSV")]
    assert found == ["openai", "jsonl", "lines", "csv"]
    assert format_of(tmp_path / "e.data", "csv") == "csv"
    with pytest.raises(ConfigError, match="e.data: unknown suffix"):
        format_of(tmp_path / "e.data")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        check(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(ConfigError, match="must be a regular file"):
        check(tmp_path / "b.txt")


def test_the_prompt_is_the_first_known_field_or_the_given_one():
    fields = {"text": "t", "messages": [], "prompt": "p", "body": "b"}
    assert prompt_of(fields, hint="") == "p"
    del fields["prompt"]
    assert prompt_of(fields, hint="") == []
    del fields["messages"]
    assert prompt_of(fields, hint="") == "t"
    assert prompt_of(fields, "body", hint="") == "b"
    message = "has no 'prompt' or 'messages' or 'text', but 'x': try --field."
    with pytest.raises(RowError, match=message):
        prompt_of({"x": 1}, hint="try --field")


def test_the_reader_reports_the_fraction_that_was_read(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 100_000)
    reader = Reader(tmp_path / "a.txt")
    assert reader.fraction == 0
    rows = iter(reader)
    next(rows)
    assert 0 < reader.fraction < 1
    assert len(list(rows)) == 99_999 and reader.fraction == 1
