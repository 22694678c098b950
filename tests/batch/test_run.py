"""Runs on a stub engine: order, failed rows, resuming, refusals, shards."""

import errno
import fcntl
import json
import logging
import os

import pytest

import jfp8kv
from jfp8kv.batch import RunStopped, Totals, load_config, merge, outputs, run_batch
from jfp8kv.batch.manifest import RunFiles
from jfp8kv.batch.progress import ProgressDisplay
from jfp8kv.batch.requests import row_seed
from jfp8kv.text.rows import Reader
from tests.batch.stub import StubEngine

WORDS = [{"word": f"w{i}", "id": i} for i in range(300)]
RESULT_FIELDS = {"text", "prompt_tokens", "completion_tokens", "finish_reason", "error"}


class StopsAfter(StubEngine):
    """An engine that raises after a number of results."""

    def __init__(self, results: int, error: BaseException | None = None):
        super().__init__()
        self.results = results
        self.error = error or KeyboardInterrupt()

    def generate(self, requests):
        for count, result in enumerate(super().generate(requests)):
            if count == self.results:
                raise self.error
            yield result


class Recorder(StubEngine):
    """An engine that records its prompts."""

    def __init__(self):
        super().__init__()
        self.prompts = []

    def _answer(self, request):
        self.prompts.append(request.prompt)
        return super()._answer(request)


def interrupted(job, after: int, *overrides: str, **options) -> bytes:
    """Interrupt a run over `WORDS`; return the output of an uninterrupted run."""
    job.rows(WORDS)
    job.run(*overrides)
    expected = job.output.read_bytes()
    job.output.unlink()
    job.manifest.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(*overrides, stub=StopsAfter(after), **options)
    return expected


def file_names(job) -> list[str]:
    return sorted(path.name for path in job.folder.iterdir())


def test_output_rows_are_in_order_with_fields_and_results(job):
    job.rows(WORDS)
    result = job.run()
    found = job.results()
    assert [{"word": row["word"], "id": row["id"]} for row in found] == WORDS
    assert found[7].keys() == {"word", "id"} | RESULT_FIELDS
    row = found[7]
    assert (row["prompt_tokens"], row["completion_tokens"], row["error"]) == (2, 16, None)
    assert result.status == 0
    assert result.totals == Totals(rows=300, failed=0, prompt_tokens=600, completion_tokens=4800)
    assert file_names(job) == ["out.jsonl", "out.jsonl.run.json", "rows.jsonl", "run.yaml"]


def test_a_run_takes_the_path_of_a_config_and_overrides(job):
    job.rows(WORDS[:3])
    open_engine = lambda *_: StubEngine()  # noqa: E731
    result = run_batch(job.config, ["output.unordered=true"], open_engine=open_engine)
    assert result.output == job.output and result.totals.rows == 3
    with pytest.raises(jfp8kv.ConfigError, match="overrides need the path of a config"):
        run_batch(load_config(job.config), ["seed=1"])


def test_a_repeated_run_gives_the_same_bytes_and_another_seed_does_not(job):
    job.rows(WORDS)
    job.run()
    first = job.output.read_bytes()
    job.run(restart=True)
    assert job.output.read_bytes() == first
    job.run("seed=1", restart=True)
    assert job.output.read_bytes() != first


def test_unordered_rows_are_the_same_rows(job):
    job.rows(WORDS)
    job.run()
    ordered = job.output.read_bytes().splitlines()
    job.run("output.unordered=true", restart=True)
    unordered = job.output.read_bytes().splitlines()
    assert unordered != ordered
    assert sorted(unordered) == sorted(ordered)


def test_the_seed_of_a_row_depends_only_on_the_run_seed_and_row_number():
    seeds = {row_seed(seed, number) for seed in range(3) for number in range(100)}
    assert len(seeds) == 300 and all(0 <= seed < 2**64 for seed in seeds)
    # A different value would change the outputs of all existing runs.
    assert row_seed(0, 0) == 11807284506806067046


def test_an_invalid_row_is_an_error_row_and_the_others_run(job):
    good = '{"word": "x"}\n'
    (job.folder / "rows.jsonl").write_bytes(
        f'{good}\nnope\n[1]\n{{"wrd": 1}}\n'.encode() + b'{"word": "\xff"}\n' + good.encode()
    )
    assert job.run().status == 1
    found = job.results()
    assert [row["error"] and row["error"]["line"] for row in found] == [None, 3, 4, 5, 6, None]
    messages = [row["error"]["message"] for row in found if row["error"]]
    assert (
        messages[0].startswith("invalid JSON")
        and "type list" in messages[1]
        and "invalid UTF-8" in messages[3]
    )
    assert (
        "uses 'word'" in messages[2]
        and "Did you mean 'wrd'" in messages[2]
        and found[3]["wrd"] == 1
    )
    assert all(row["text"] is None for row in found if row["error"])


def test_a_row_that_is_refused_or_fails_in_the_engine_is_an_error_row(job):
    job.write('prompt: "{{ word }}"')
    job.rows([{"word": "a"}, {"word": ""}, {"word": "poison"}, {"word": "b"}])
    assert job.run(stub=StubEngine(broken="poison")).status == 1
    messages = [row["error"] and row["error"]["message"] for row in job.results()]
    assert messages[0] is None and messages[3] is None
    assert messages[1] == "the prompt is empty: at least one character is needed."
    assert messages[2] == "engine error: the device is on fire"


def test_an_engine_that_fails_on_every_row_stops_the_run(job):
    job.rows(WORDS)
    with pytest.raises(
        RunStopped,
        match="the engine fails on every row: the device is on fire.*the same command",
    ):
        job.run(stub=StubEngine(broken="Say"))
    assert file_names(job) == ["rows.jsonl", "run.yaml"]
    assert job.run().totals.failed == 0, "the rows did not fail"


def test_an_unexpected_error_stops_the_run_and_its_traceback_is_logged(job, caplog):
    job.rows(WORDS)
    with (
        caplog.at_level(logging.ERROR, "jfp8kv"),
        pytest.raises(
            RunStopped, match="unexpected TypeError: a bug. .*100 finished rows are kept"
        ),
    ):
        job.run(stub=StopsAfter(100, TypeError("a bug")))
    (record,) = caplog.records
    assert record.exc_info[0] is TypeError
    assert job.run().totals == Totals(rows=300, prompt_tokens=600, completion_tokens=4800)


def test_an_interrupted_run_resumes_with_the_unfinished_rows(job, capsys):
    expected = interrupted(job, 100, display=ProgressDisplay())
    shown = capsys.readouterr().err
    assert "interrupted: 100 finished rows are kept in " in shown
    assert "the same command resumes" in shown
    assert not job.output.exists() and len(job.partial.read_bytes().splitlines()) == 100
    stub = Recorder()
    job.run(stub=stub, display=ProgressDisplay())
    assert "resuming after 100 finished rows" in capsys.readouterr().err
    assert (
        len(stub.prompts) == len(set(stub.prompts)) == 200 and job.output.read_bytes() == expected
    )
    sessions = json.loads(job.manifest.read_text())["sessions"]
    assert len(sessions) == 2 and sessions[1]["rows"] == 200


DAMAGE = {  # a change of the lines of a journal, and the number of rows that are lost
    "a torn head": (lambda lines: [*lines, b'{"row":5,"in":1,"ou'], 0),
    "a torn output": (
        lambda lines: [*lines, b'{"row":9,"in":1,"out":2,"ok":true,"output":{"text":"ab'],
        0,
    ),
    "zeros at the end": (lambda lines: [*lines, b"\0" * 4096 + b"\n"], 0),
    "zeros in the middle": (lambda lines: [*lines[:40], b"\0" * 100 + b"\n", *lines[41:]], 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_of_a_journal_loses_only_its_row(job, kind):
    damage, cost = DAMAGE[kind]
    expected = interrupted(job, 100)
    job.partial.write_bytes(b"".join(damage(job.partial.read_bytes().splitlines(keepends=True))))
    stub = Recorder()
    job.run(stub=stub)
    assert len(stub.prompts) == 200 + cost and job.output.read_bytes() == expected


def test_a_complete_run_is_not_repeated(job):
    job.rows([*WORDS[:3], {"wrd": 1}])
    assert not job.run().already_complete
    again = job.run(stub=StubEngine(broken="Say"))
    assert again.already_complete and again.status == 1 and again.totals.rows == 4
    with pytest.raises(jfp8kv.ConfigError, match="output.unordered was false, is true"):
        job.run("output.unordered=true")
    job.output.rename(job.folder / "elsewhere.jsonl")
    with pytest.raises(
        jfp8kv.ConfigError,
        match=r"out.jsonl: missing, although its run is complete: restore it, or .*--restart",
    ):
        job.run()


def test_a_changed_config_input_or_model_is_refused_with_the_changes(job):
    job.rows(WORDS)
    model = job.folder / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"0" * 100_000)
    named = f"model={model}"
    with pytest.raises(KeyboardInterrupt):
        job.run(named, stub=StopsAfter(10))
    for changes, message in {
        ("seed=4",): r"config.seed was 0, is 4.*--restart",
        (
            "sampling.top_p=0.5",
            "prompt=Tell {{ word }}",
        ): r'config.sampling.top_p was 1.0, is 0.5; config.prompt was "Say {{ wo',
        (
            "input.format=lines",
        ): r'config.input.format was "auto", is "lines"; input.format was "jsonl", is "lines"',
    }.items():
        with pytest.raises(jfp8kv.ConfigError, match=message):
            job.run(named, *changes)
    (model / "weights").write_bytes(b"0" * 99_999 + b"1")
    (model / ".of_a_download").touch()
    with pytest.raises(
        jfp8kv.ConfigError, match="settings: model.weights.sha256_of_samples was [^;]*$"
    ):
        job.run(named)
    job.rows(WORDS[:-1])
    with pytest.raises(jfp8kv.ConfigError, match=r"input.bytes was \d+, is \d+; input.sha256 was"):
        job.run()
    assert job.run(restart=True).totals.rows == 299


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("engine.max_num_seqs=8", "engine.kv_cache_memory=1GiB")),
        (("sampling={logit_bias: {5: -1.0}}",), ()),  # JSON has no integer keys
        (("output.unordered=true",), ("output.unordered=false",)),
        ((), ("input=renamed.jsonl",)),
        (("model=.",), ()),  # where the run has its own files, too
    ],
)
def test_a_run_resumes_if_no_output_depends_on_the_change(job, monkeypatch, before, after):
    monkeypatch.chdir(job.folder)
    expected = interrupted(job, 10, *before)
    if "input=renamed.jsonl" in after:
        (job.folder / "rows.jsonl").rename("renamed.jsonl")
    stub = Recorder()
    job.run(*before, *after, stub=stub)
    assert len(stub.prompts) == 290 and sorted(job.output.read_bytes().splitlines()) == sorted(
        expected.splitlines()
    )


def test_a_file_of_another_source_is_not_replaced(job):
    job.rows(WORDS)
    job.output.write_text("precious\n")
    with pytest.raises(jfp8kv.ConfigError, match="exists and was not written by jfp8kv batch"):
        job.run()
    assert job.output.read_text() == "precious\n"
    job.output.unlink()
    job.partial.write_text("what?\n")
    with pytest.raises(jfp8kv.ConfigError, match=".*partial cannot be resumed"):
        job.run()


def test_a_file_system_without_locks_is_reported(job, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    job.rows(WORDS)
    with pytest.raises(
        jfp8kv.NotSupported, match=r"out.jsonl.lock: cannot be locked \(No locks available\): give"
    ):
        job.run()


def test_finished_rows_are_kept_if_the_input_becomes_unreadable(job, monkeypatch):
    from jfp8kv.text import rows

    job.rows(WORDS)
    line_rows = rows._line_rows

    def breaks(stream, parse):
        for row in line_rows(stream, parse):
            if row.number == 200:
                raise OSError(5, "Input/output error")
            yield row

    monkeypatch.setattr(rows, "_line_rows", breaks)
    with pytest.raises(
        RunStopped,
        match=r"cannot be read further: .*Input/output error.* 200 finished rows are kept",
    ):
        job.run("input.format=jsonl")
    monkeypatch.undo()
    assert job.run("input.format=jsonl").totals.rows == 300


def test_an_output_that_cannot_be_written_is_written_by_the_next_run(job, monkeypatch):
    job.rows(WORDS)

    def full(path, rows=None):
        if rows is not None:
            path.write_text("some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "_write_lines", full)
    with pytest.raises(
        RunStopped, match="all rows are finished, but .* cannot be written: No space left on device"
    ):
        job.run()
    assert not job.output.exists() and not job.output.with_name("out.jsonl.new").exists()
    monkeypatch.undo()
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunStopped, match="run.json: No space left on device. 300 finished rows are"),
    ):
        patch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        job.run()
    assert not job.manifest.with_name("out.jsonl.run.json.new").exists()
    assert job.run(stub=StubEngine(broken="Say")).totals == Totals(
        rows=300, failed=0, prompt_tokens=600, completion_tokens=4800
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '{"name": "a"}\n{"name": "b"}\n',
            r":1: the template uses 'word'.*The row has name. None of the first 2 rows is valid",
        ),
        (
            '{"word": "a", "text": "b"}\n',
            "the field 'text' has the name of a result: give `output.prefix`",
        ),
        ("w\0o\0r\0d\0\n" * 20, r":1: invalid JSON: .* None of the first 16 rows is valid"),
        (
            '{"word": null}\n',
            r":1: the template uses a null, which has no text: write \{\{ field or '' \}\}",
        ),
    ],
)
def test_a_mistake_in_all_rows_is_found_before_the_engine_opens(job, rows, message):
    (job.folder / "rows.jsonl").write_text(rows)
    with pytest.raises(jfp8kv.ConfigError, match=message):
        run_batch(job.config, open_engine=lambda *_: pytest.fail("the engine is opened"))
    assert file_names(job) == ["rows.jsonl", "run.yaml"]


def test_a_prefix_separates_results_from_fields_of_the_same_name(job):
    job.write('prompt: "{{ text }}"')
    job.rows([{"text": "a"}])
    job.run("output.prefix=new_")
    (row,) = job.results()
    assert row["text"] == "a" and len(row["new_text"]) == 16 and row["new_error"] is None


def test_rows_that_do_not_fit_a_table_can_be_written_as_json_lines(job):
    job.write(out="out.parquet")
    job.rows([*WORDS[:5], {"word": "a", "id": 2**70}])
    message = r"rows.jsonl:6: the field 'id' does not fit .*`--set output.format=jsonl`"
    with pytest.raises(jfp8kv.ConfigError, match=message):
        job.run()
    assert not job.output.exists() and not job.manifest.exists()
    job.run("output.format=jsonl")
    assert [row["id"] for row in job.results()] == [*range(5), 2**70]


def test_log_probabilities_and_several_outputs_are_written(job):
    job.rows(WORDS[:1])
    job.run("sampling={logprobs: 1, n: 2, max_tokens: 16}")
    (row,) = job.results()
    assert len(row["text"]) == len(row["logprobs"]) == 2 and row["text"][0] != row["text"][1]
    first = row["logprobs"][0][0]
    assert first == {
        "token_id": ord(row["text"][0][0]),
        "token": row["text"][0][0],
        "logprob": -0.5,
    } | {"top": first["top"]}
    assert {"token_id": 0, "token": "\0", "logprob": -1.5} in first["top"] and row[
        "completion_tokens"
    ] == [16, 16]


def test_completions_are_scored(job):
    job.write('task: score\nprompt: "{{ question }}"\ncompletion: " {{ answer }}"')
    job.rows([{"question": "how far ?", "answer": "a mile"}, {"question": "no answer"}])
    assert job.run().status == 1
    good, bad = job.results()
    assert (
        good["logprob"],
        good["logprobs"],
        good["prompt_tokens"],
        good["completion_tokens"],
    ) == (-5.0, [-1.0, -4.0], 3, 2)
    assert (
        good["question"] == "how far ?"
        and bad["logprob"] is None
        and "'answer'" in bad["error"]["message"]
    )


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_merged_shards_are_the_output_of_one_run(job, out):
    job.write(out=out)
    job.rows([*WORDS[:50], {"wrd": 1}, *WORDS[50:]])
    job.run()
    expected, rows = (
        job.output.read_bytes(),
        [row.fields() for row in Reader(job.output)],
    )
    job.output.unlink(), RunFiles(job.output).manifest.unlink()
    for i in range(3):
        result = job.run(f"shard=[{i},3]")
        part = [row.fields() for row in Reader(result.output)]
        assert result.output.name == out.replace(".", f".{i}-of-3.") and len(part) == len(
            rows[i::3]
        )
        assert [row["text"] for row in part] == [row["text"] for row in rows[i::3]]
    totals = merge(load_config(job.config))
    assert job.output.read_bytes() == expected if out == "out.jsonl" else True
    assert [row.fields() for row in Reader(job.output)] == rows
    assert (totals.rows, totals.failed) == (301, 1)
    assert job.run().already_complete


def test_missing_unfinished_or_other_shards_are_not_merged(job):
    job.rows(WORDS)
    with pytest.raises(jfp8kv.ConfigError, match="out.I-of-N.jsonl: no shards found"):
        merge(load_config(job.config))
    job.run("shard=[0,2]")
    with pytest.raises(
        jfp8kv.ConfigError, match="out.1-of-2.jsonl: missing; 1 of 2 shards are finished"
    ):
        merge(load_config(job.config))
    other = job.run("shard=[1,2]", "seed=5")
    with pytest.raises(
        jfp8kv.ConfigError,
        match="out.1-of-2.jsonl: belongs to another run than .*config.seed was 0, is 5",
    ):
        merge(load_config(job.config))
    RunFiles(other.output).manifest.unlink()
    with pytest.raises(
        jfp8kv.ConfigError, match="cannot be read, so .*1-of-2.jsonl may be incomplete"
    ):
        merge(load_config(job.config))
    job.run("shard=[2,3]")
    with pytest.raises(
        jfp8kv.ConfigError,
        match=r"there are outputs of 2 and 3 shards: select with --set shard=\[0,N\]",
    ):
        merge(load_config(job.config))
    job.output.write_text("precious")
    with pytest.raises(jfp8kv.ConfigError, match="exists already"):
        merge(load_config(job.config))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt"])
def test_the_same_rows_in_every_format_give_the_same_outputs(job, name):
    import pyarrow
    from pyarrow import parquet

    words = [f"word, {i}" for i in range(40)]
    job.rows([{"prompt": word} for word in words])
    job.write("")
    job.run()
    want = job.results()
    (job.folder / "rows.csv").write_text("prompt\n" + "".join(f'"{word}"\n' for word in words))
    (job.folder / "rows.txt").write_text("\n".join(words))
    parquet.write_table(pyarrow.table({"prompt": words}), job.folder / "rows.parquet")
    job.write("", rows=name, out="other.jsonl")
    job.run()
    assert job.results() == want


def test_an_empty_input_gives_an_empty_output(job):
    job.rows([])
    assert job.run().totals.rows == 0 and job.output.read_bytes() == b""
