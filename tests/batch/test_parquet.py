"""Parquet: columns of the input are copied unchanged; unwritable data is refused first."""

import datetime
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

import jfp8kv
from jfp8kv.batch import RunStopped, dry_run, load_config, merge, parquet_schema
from jfp8kv.batch import parquet as batch_parquet
from jfp8kv.batch.manifest import RunFiles
from jfp8kv.text.rows import Reader
from tests.batch.conftest import ROOT
from tests.batch.stub import StubEngine

MODEL = ROOT / "tests" / "references" / "llama_bf16"
RESULTS = ["text", "prompt_tokens", "completion_tokens", "finish_reason", "error"]
INVALID_UTF8 = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
COLUMNS = {
    "float16": pa.array([1.5, None, 2.5], pa.float16()),
    "float32": pa.array([0.1, None, 1e-40], pa.float32()),
    "small integers": pa.array([1, None, -128], pa.int8()),
    "large integers": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "time in nanoseconds": pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    "time in milliseconds": pa.array([1, None, 5], pa.time32("ms")),
    "duration": pa.array([1, None, -5], pa.duration("ns")),
    "long duration": pa.array([2**62, None, 1], pa.duration("us")),
    "timestamp": pa.array([1, None, 2**60], pa.timestamp("ns")),
    "timestamp after year 9999": pa.array([2**62, None, 1], pa.timestamp("us")),
    "timestamp with time zone": pa.array([1, None, 5], pa.timestamp("ms", "Europe/Paris")),
    "timestamp with offset": pa.array([1, None, 5], pa.timestamp("ns", "+05:30")),
    "date": pa.array([1, None, 2**30], pa.date32()),
    "decimal": pa.array([1, None, 2], pa.decimal128(30, 9)),
    "long decimal": pa.array([1, None, 2], pa.decimal256(60, 2)),
    "map": pa.array([[("a", 1), ("b", None)], None, []], pa.map_(pa.string(), pa.int32())),
    "map with a repeated key": pa.array(
        [[("a", 1), ("a", 2)], [], []], pa.map_(pa.string(), pa.int8())
    ),
    "map of durations": pa.array([[(1, 1)], None, []], pa.map_(pa.int8(), pa.duration("ns"))),
    "nulls": pa.nulls(3),
    "strings of nulls": pa.nulls(3, pa.string()),
    "lists of nulls": pa.array([[None], [], None], pa.list_(pa.null())),
    "binary": pa.array([b"\0\xff", None, b""]),
    "fixed binary": pa.array([b"ab", None, b"\0\0"], pa.binary(2)),
    "large strings": pa.array(["a", None, ""], pa.large_string()),
    "string views": pa.array(["a", None, "b" * 20], pa.string_view()),
    "lists": pa.array([[1.5], None, []], pa.large_list(pa.float32())),
    "list views": pa.array([[1], None, []], pa.list_view(pa.int8())),
    "fixed lists": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int8(), 2)),
    "structs": pa.array([{"t": 1, "x": [{"y": b"1"}]}, None, {"t": None, "x": None}]).cast(
        pa.struct(
            {"t": pa.duration("ns"), "x": pa.list_(pa.struct({"y": pa.binary()}))},
        )
    ),
    "structs with a repeated name": pa.StructArray.from_arrays(
        [pa.array([1, 2, 3]), pa.array(["x", "y", None])], names=["a", "a"]
    ),
    "categories": pa.array(["a", None, "b"]).dictionary_encode(),
    "ordered categories": pa.DictionaryArray.from_arrays(
        pa.array([1, None, 0], pa.int8()), ["a", "b"], ordered=True
    ),
    "uuid": pa.array([b"a" * 16, None, b"b" * 16], pa.uuid()),
    "json": pa.array(["{}", None, "1"], pa.json_()),
    "invalid utf-8": pa.Array.from_buffers(pa.string(), 3, INVALID_UTF8),
}


class NeverStarted(StubEngine):
    def generate(self, requests):
        raise AssertionError("the engine was started")


@pytest.fixture
def table(job):
    """Write the input and return what is read from the file."""

    def table(columns, *, text='prompt: "Say {{ word }}"', **schema):
        job.write(text, rows="rows.parquet", out="out.parquet")
        written = columns if isinstance(columns, pa.Table) else pa.table(columns, **schema)
        parquet.write_table(written, job.folder / "rows.parquet")
        return parquet.ParquetFile(job.folder / "rows.parquet").read()

    return table


def words(count):
    return pa.array([f"w{number}" for number in range(count)])


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("shards", [1, 2])
def test_columns_keep_their_type_and_values(job, table, name, shards):
    source = table({"word": words(3), "x": COLUMNS[name]})
    if shards == 1:
        job.run()
    else:
        for index in range(shards):
            job.run(f"shard=[{index},{shards}]")
        merge(load_config(job.config))
    found = parquet.read_table(job.output)
    assert found.column_names == ["word", "x", *RESULTS]
    assert found.schema.field("x").equals(source.schema.field("x"), check_metadata=True)
    assert found.column("x").combine_chunks().equals(source.column("x").combine_chunks())
    assert None not in found.column("text").to_pylist()


@pytest.mark.parametrize(
    ("name", "code", "column"),
    [
        ("INTERVAL", 21, pa.array([b"\1\0\0\0\2\0\0\0\3\0\0\0", None, b"\0" * 12], pa.binary(12))),
        ("ENUM", 4, pa.array([b"A", None, b"B"])),
        ("BSON", 20, pa.array([b"A", None, b"B"])),
    ],
)
def test_bytes_of_types_that_arrow_lacks_are_kept_with_a_warning(job, caplog, name, code, column):
    """The annotation is set in the footer, because pyarrow cannot write it."""
    path = job.folder / "rows.parquet"
    job.write(rows="rows.parquet", out="out.parquet")
    parquet.write_table(pa.table({"word": words(3), "x": column}), path, store_schema=False)
    content = path.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - size : -8]
    plain = b"\x18\x01x\x00"  # name "x", end; field 6 is the annotation
    assert footer.count(plain) == 1
    footer = footer.replace(plain, b"\x18\x01x\x25" + bytes([2 * code]) + b"\x00")
    path.write_bytes(content[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert parquet.ParquetFile(path).schema.column(1).converted_type == name
    job.run()
    assert parquet.read_table(job.output).column("x").combine_chunks().equals(column)
    assert f"the column x has Parquet's type {name}" in caplog.text and "word" not in caplog.text


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_nan_infinity_and_negative_zero_are_kept(job, table, kind):
    values = [float("nan"), float("inf"), -float("inf"), -0.0, None]
    nested = pa.array([[value] for value in values], pa.list_(kind))
    table({"word": words(5), "x": pa.array(values, kind), "nested": nested})
    job.run()
    found = parquet.read_table(job.output)
    assert str(found.column("x").to_pylist()) == str(values)
    assert str(found.column("nested").to_pylist()) == str([[value] for value in values])


def test_the_schema_keeps_metadata_and_columns_without_nulls(job, table):
    schema = pa.schema(
        [pa.field("word", pa.string(), nullable=False, metadata={"unit": "word"})],
        metadata={"origin": "a test"},
    )
    source = table(pa.table({"word": words(3)}, schema=schema))
    job.run()
    found = parquet.read_schema(job.output)
    assert found.metadata[b"origin"] == b"a test"
    assert found.field("word").equals(source.schema.field("word"), check_metadata=True)


@pytest.mark.parametrize(
    "columns",
    [
        {"word": pa.array([], pa.string())},
        {"word": pa.array([], pa.string()), "x": pa.array([], pa.duration("ns"))},
        {"word": pa.array([], pa.null())},
    ],
)
def test_an_empty_table_keeps_its_columns_and_gets_those_of_the_results(job, table, columns):
    source = table(columns)
    job.run()
    found = parquet.read_table(job.output)
    assert found.num_rows == 0 and found.column_names == [*columns, *RESULTS]
    assert found.select([*columns]).schema == source.schema


@pytest.mark.parametrize("overrides", [[], ["sampling={n: 2, logprobs: 1}"]])
@pytest.mark.parametrize("broken", ["w5", "Say", None])
def test_the_schema_does_not_depend_on_the_results(job, table, overrides, broken):
    table({"word": words(20), "at": pa.array(range(20), pa.duration("s"))})
    job.run(*overrides)
    expected = parquet.read_table(job.output)
    if broken == "Say":
        table({"word": pa.array([""] * 20), "at": pa.array(range(20), pa.duration("s"))})
        job.write('prompt: "{{ word }}"', rows="rows.parquet", out="out.parquet")
    job.run(*overrides, stub=StubEngine(broken=broken), restart=True)
    found = parquet.read_table(job.output)
    assert found.schema == expected.schema
    assert found.column("at") == expected.column("at")
    failed = {"w5": 1, "Say": 20, None: 0}[broken]
    assert sum(error is not None for error in found.column("error").to_pylist()) == failed


def test_log_probabilities_and_scores_have_columns(job, table):
    table({"word": words(3)})
    job.run("sampling.logprobs=1")
    (first, *_) = parquet.read_table(job.output).column("logprobs").to_pylist()[0]
    assert (
        first["logprob"] == -0.5
        and {"token_id": 0, "token": "\0", "logprob": -1.5} in (first["top"])
    )
    job.run("sampling={logprobs: 1, n: 2}", restart=True)
    assert len(parquet.read_table(job.output).column("logprobs").to_pylist()[0]) == 2
    job.write('task: score\nprompt: "{{ word }}"', rows="rows.parquet", out="out.parquet")
    job.run(restart=True)
    found = parquet.read_table(job.output)
    assert found.column("logprobs").to_pylist() == [[-2.0]] * 3
    assert found.column("logprob").to_pylist() == [-2.0] * 3


@pytest.mark.parametrize("overrides", [[], ["output.unordered=true"], ["shard=[1,3]"]])
def test_rows_stay_beside_their_results_over_many_groups(job, table, monkeypatch, overrides):
    monkeypatch.setattr(batch_parquet, "GROUP_ROWS", 7)
    count = 100
    columns = {
        "word": words(count),
        "x": pa.array(range(count), pa.duration("ns")),
        "kind": pa.array([f"k{number % 5}" for number in range(count)]).dictionary_encode(),
    }
    source = table(columns)
    parquet.write_table(source, job.folder / "rows.parquet", row_group_size=11)
    result = job.run(*overrides)
    found = parquet.read_table(result.output)
    rows = list(range(1, count, 3)) if "shard=[1,3]" in overrides else list(range(count))
    assert found.select([*columns]) == source.take(rows)
    job.write(rows="rows.parquet", out="other.jsonl")
    job.run()
    expected = [job.results()[row]["text"] for row in rows]
    assert found.column("text").to_pylist() == expected


def test_large_rows_are_read_a_few_at_a_time(job, table, monkeypatch):
    monkeypatch.setattr(batch_parquet, "GROUP_BYTES", 5000)
    source = table({"word": words(40), "image": pa.array([bytes([n]) * 1000 for n in range(40)])})
    job.run()
    with parquet.ParquetFile(job.output) as file:
        assert file.metadata.num_row_groups > 5
        assert file.read(["image"]).column(0) == source.column("image")


def test_merged_shards_equal_a_run_without_shards(job, table, monkeypatch):
    monkeypatch.setattr(batch_parquet, "GROUP_ROWS", 10)
    table({"word": words(50), "x": pa.array([float("nan"), None] * 25)})
    job.run()
    expected = parquet.read_table(job.output)
    job.output.unlink()
    RunFiles(job.output).manifest.unlink()
    for index in range(4):
        job.run(f"shard=[{index},4]")
    merge(load_config(job.config))
    found = parquet.read_table(job.output)
    assert found.schema == expected.schema
    assert str(found.to_pylist()) == str(expected.to_pylist())


def test_an_input_that_changes_during_the_run_is_not_joined(job, table):
    table({"word": words(30)})

    class Changing(StubEngine):
        def generate(self, requests):
            yield from super().generate(requests)
            table({"word": words(29)})

    with pytest.raises(RunStopped, match=r"rows.parquet: has changed since the run started"):
        job.run(stub=Changing())
    table({"word": words(30)})
    job.run(stub=StubEngine(broken="Say"))  # no row runs again
    assert parquet.read_table(job.output).num_rows == 30


# -- refused at the start --------------------------------------------------------------------------


def refused(job, message, *overrides):
    """Check that a run and a dry run raise before the first row, and leave no files."""
    before = sorted(job.folder.iterdir())
    with pytest.raises(jfp8kv.ConfigError, match=message):
        job.run(*overrides, stub=NeverStarted())
    with pytest.raises(jfp8kv.ConfigError, match=message):
        dry_run(load_config(job.config, [f"model={MODEL}", *overrides]))
    assert sorted(job.folder.iterdir()) == before


@pytest.mark.parametrize("names", [["word", "word"], ["word", "a", "b", "a"], ["word", "", ""]])
@pytest.mark.parametrize("out", ["out.parquet", "out.jsonl"])
@pytest.mark.parametrize("rows", [0, 3])
def test_two_columns_of_one_name_are_refused(job, table, names, out, rows):
    table(pa.Table.from_arrays([words(rows)] * len(names), names=names))
    job.write(rows="rows.parquet", out=out)
    repeated = max(names, key=names.count)
    refused(job, f"rows.parquet: has two columns of the name '{repeated}'")
    with pytest.raises(jfp8kv.ConfigError, match="two columns of the name"):
        list(Reader(job.folder / "rows.parquet"))


@pytest.mark.parametrize("name", ["text", "error", "logprobs"])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_column_with_the_name_of_a_result_is_refused(job, table, name, rows):
    table({"word": words(rows), name: words(rows)})
    overrides = ["sampling.logprobs=1"]
    refused(job, f"the (column|field) '{name}' has the name of a result", *overrides)
    job.run(*overrides, "output.prefix=new_")
    assert f"new_{name}" in parquet.read_schema(job.output).names


UNWRITABLE = {
    "an integer beyond 64 bits": ([{"a": 1}, {"a": 2**70}], r"jsonl:2: the field 'a'"),
    "types without a common one": ([{"a": 1}] * 4 + [{"a": "x"}], r"jsonl:5: the field 'a'"),
    "types in different groups": ([{"a": 1}] * 48 + [{"a": "x"}], "incompatible types: int64 vs s"),
    "nested types": ([{"a": {"b": [1]}}, {"a": {"b": [True]}}], r"jsonl:2: the field 'a'"),
    "an integer that a float column rounds": (
        [{"a": 0.5}] * 40 + [{"a": 2**60 + 1}],
        r"jsonl:41: the field 'a'",
    ),
    "large integers before floats": (
        [{"a": 2**60 + 1}] * 16 + [{"a": 0.5}],
        r"jsonl:1: the field 'a'",
    ),
    "nested integers before floats": (
        [{"a": [{"b": 2**60 + 1}]}] * 16 + [{"a": [{"b": 0.5}]}],
        r"jsonl:1: the field 'a'",
    ),
    "an object without keys": ([{"a": {}}], "the column 'a' of type struct<> cannot be written"),
    "an unpaired surrogate": ([{"a": "x"}, {"a": "\ud800"}], r"jsonl:2: the field 'a'"),
    "an unpaired surrogate in a list": ([{"a": ["x", "\udfff"]}], r"jsonl:1: the field 'a'"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
@pytest.mark.parametrize("shard", [[], ["shard=[1,2]"]])
def test_rows_that_parquet_cannot_store_are_refused(job, monkeypatch, case, shard):
    monkeypatch.setattr(parquet_schema, "GROUP_ROWS", 16)
    rows, message = UNWRITABLE[case]
    job.write(out="out.parquet")
    job.rows([{"word": "a"} | row for row in rows])
    refused(job, message, *shard)
    with pytest.raises(jfp8kv.ConfigError, match="`--set output.format=jsonl`"):
        job.run(*shard)
    job.run("output.format=jsonl")
    assert [row["a"] for row in job.results()] == [row["a"] for row in rows]


def test_rows_that_cannot_be_parsed_do_not_prevent_a_table(job):
    job.write(out="out.parquet")
    lines = ['{"word": "a", "x": 1}', "nope", '{"word": "b", "x": 0.5, "text": {}}', '{"wrd": 1}']
    (job.folder / "rows.jsonl").write_text("\n".join(lines))
    job.run()
    rows = parquet.read_table(job.output).to_pylist()
    assert [row["x"] for row in rows] == [1.0, None, 0.5, None]
    assert [row["error"] is None for row in rows] == [True, False, False, False]


def test_an_error_that_quotes_an_unpaired_surrogate_is_written(job):
    job.write('prompt: "{{ word[x] }}"', out="out.parquet")
    job.rows([{"word": {"a": "b"}, "x": "a"}] * 3)

    class Quoting(StubEngine):
        def generate(self, requests):
            for number, _ in enumerate(requests):
                yield number, jfp8kv.ConfigError("the prompt has '\ud800'")

    job.run(stub=Quoting())
    (message,) = {
        error["message"] for error in parquet.read_table(job.output).column("error").to_pylist()
    }
    assert message == "the prompt has '\\ud800'"


# -- values in templates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timestamp", "1970-01-01 00:00:00.000000001"),
        ("time in nanoseconds", "00:00:00.000000001"),
        ("duration", "1"),
        ("invalid utf-8", "\\xff"),
        ("structs with a repeated name", [("a", 1), ("a", "x")]),
        ("map of durations", [(1, "1")]),
    ],
)
def test_values_that_python_lacks_are_text(job, table, name, expected):
    table({"word": words(3), "x": COLUMNS[name]})
    rows = [row.fields() for row in Reader(job.folder / "rows.parquet")]
    if name == "invalid utf-8":
        assert rows[1]["x"] == "" and rows[0]["x"] == expected
    else:
        assert rows[0]["x"] == expected
    job.write('prompt: "Say {{ x }}"', rows="rows.parquet", out="out.jsonl")
    job.run()
    assert json.loads(json.dumps(expected)) == job.results()[0]["x"]


def test_values_that_python_has_keep_their_types_beside_others(job, table):
    table({"word": words(2), "x": pa.array([10**9, 1], pa.timestamp("ns"))})
    rows = [row.fields()["x"] for row in Reader(job.folder / "rows.parquet")]
    assert rows == [datetime.datetime(1970, 1, 1, 0, 0, 1), "1970-01-01 00:00:00.000000001"]
