"""The row reader that batch runs and the command line share."""

import csv
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


def test_an_invalid_csv_record_does_not_affect_the_others(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'word,n\na,1\n\xff,2\n"x"y,3\nb,4\n')
    first, second, third, fourth = (fields for _, _, fields in read(path))
    assert (first, fourth) == ({"word": "a", "n": "1"}, {"word": "b", "n": "4"})
    assert second == "invalid UTF-8."
    assert third.startswith("invalid CSV: ")


@pytest.mark.parametrize(("text", "rows"), [("\n\nword\na\n", [(0, 4, {"word": "a"})]), ("", [])])
def test_the_csv_header_is_the_first_record(tmp_path, text, rows):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert read(path) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('word,"n"x\na,1\n', "a.csv:1: the header is invalid CSV: "),
        ("a,b,a\n", "a.csv:1: the header has the field 'a' twice"),
    ],
)
def test_an_invalid_csv_header_is_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_csv_fields_have_no_size_limit_and_the_limit_of_the_process_stays(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("word\n" + "x" * 200_000 + "\n")
    limit = csv.field_size_limit()
    for row in Reader(path):
        assert len(row.fields()["word"]) == 200_000
        assert csv.field_size_limit() == limit


def test_plain_lines_are_prompts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n two \n\xff\nthree")
    assert read(path) == [
        (0, 1, {"prompt": "one"}),
        (1, 3, {"prompt": " two "}),
        (2, 4, "invalid UTF-8: invalid start byte at byte 0."),
        (3, 5, {"prompt": "three"}),
    ]


def test_parquet_rows_are_read_in_order(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(i, i + 1, row) for i, row in enumerate(ROWS)]
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="b.parquet: cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_parquet_rows_are_read_in_batches(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"word": f"w{i}", "n": i, "tags": ["a"] * (i % 3), "score": None if i % 7 else 0.5}
        for i in range(1000)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [fields for _, _, fields in read(tmp_path / "a.parquet")] == rows


def test_a_damaged_parquet_file_is_reported(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pa.table({"a": ["x" * 50] * 1000})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[20_000:20_400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="a.parquet: cannot be read as Parquet"):
        read(path)


def test_the_format_comes_from_the_suffix_and_the_first_row(tmp_path):
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    (tmp_path / "a.jsonl").write_text("invalid\n" + json.dumps(request))
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
    message = "no field 'prompt' or 'messages' or 'text'; the row has 'x': try --field."
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"/annex/objects/SHA256E-s12--ab\n", "git-annex pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_a_pointer_or_web_page_in_place_of_a_file_of_rows_is_refused(
    tmp_path, name, content, found
):
    (tmp_path / name).write_bytes(content)
    if name == "a.txt" and found == "a web page":  # may be text
        check(tmp_path / name)
        return
    with pytest.raises(ConfigError, match=f"{name}: {found}|{name}: a {found}"):
        check(tmp_path / name)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(ConfigError, match="a.parquet: cannot be read as Parquet"):
        check(tmp_path / "a.parquet")
