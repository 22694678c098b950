"""Runs over a stub: each row once and in order, what is wrong with one told beside it, going on, and being refused to."""

import errno
import fcntl
import json
import os

import pytest

import jfp8kv
from jfp8kv.batch import outputs
from jfp8kv.batch.check import load
from jfp8kv.batch.config import File
from jfp8kv.batch.inputs import Reader
from jfp8kv.batch.merge import merge
from jfp8kv.batch.plain import row_seed
from jfp8kv.batch.record import Paths
from jfp8kv.batch.run import RunStopped, run
from jfp8kv.batch.view import View
from tests.batch.stub import Stub

WORDS = [{"word": f"w{i}", "id": i} for i in range(300)]


class Stops(Stub):
    """Answers so many requests, then raises what a killed process would not even see."""

    def __init__(self, after: int, error: BaseException | None = None):
        super().__init__()
        self.after, self.error = after, error or KeyboardInterrupt()

    def generate(self, requests):
        for count, each in enumerate(super().generate(requests)):
            if count == self.after:
                raise self.error
            yield each


class Counts(Stub):
    """Keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def _answer(self, request):
        self.asked.append(request.prompt)
        return super()._answer(request)


def broken_off(job, after: int, *overrides: str, **options) -> bytes:
    """A run over `WORDS` that was stopped after so many rows; what it would have made."""
    job.rows(WORDS)
    job.run(*overrides)
    whole = job.output.read_bytes()
    job.output.unlink(), job.record.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(*overrides, stub=Stops(after), **options)
    return whole


def test_rows_come_out_in_order_with_their_fields_and_results(job):
    job.rows(WORDS)
    outcome = job.run()
    found = job.results()
    assert [{"word": row["word"], "id": row["id"]} for row in found] == WORDS
    assert found[7].keys() == {
        "word",
        "id",
        "text",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "error",
    }
    assert (found[7]["prompt_tokens"], found[7]["completion_tokens"], found[7]["error"]) == (
        2,
        16,
        None,
    )
    assert outcome.status == 0 and outcome.totals == {
        "rows": 300,
        "failed": 0,
        "prompt_tokens": 600,
        "completion_tokens": 4800,
    }
    assert sorted(path.name for path in job.folder.iterdir()) == [
        "out.jsonl",
        "out.jsonl.run.json",
        "rows.jsonl",
        "run.yaml",
    ]


def test_the_same_run_again_gives_the_same_bytes_and_another_seed_others(job):
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
    assert (
        sorted(job.output.read_bytes().splitlines())
        == sorted(ordered)
        != job.output.read_bytes().splitlines()
    )


def test_a_rows_seed_depends_on_the_runs_seed_and_its_number_alone():
    seeds = {row_seed(seed, number) for seed in range(3) for number in range(100)}
    assert len(seeds) == 300 and all(0 <= seed < 2**64 for seed in seeds)
    assert (
        row_seed(0, 0) == 11807284506806067046
    )  # kept: another one would change every text ever made


def test_a_bad_row_is_an_error_row_with_its_line_and_the_others_run(job):
    good = '{"word": "x"}\n'
    (job.folder / "rows.jsonl").write_bytes(
        f'{good}\nnope\n[1]\n{{"wrd": 1}}\n'.encode() + b'{"word": "\xff"}\n' + good.encode()
    )
    assert job.run().status == 1
    found = job.results()
    assert [row["error"] and row["error"]["line"] for row in found] == [None, 3, 4, 5, 6, None]
    messages = [row["error"]["message"] for row in found if row["error"]]
    assert (
        messages[0].startswith("is no JSON")
        and "type list" in messages[1]
        and "no UTF-8" in messages[3]
    )
    assert (
        "wants 'word'" in messages[2]
        and "Did you mean 'wrd'" in messages[2]
        and found[3]["wrd"] == 1
    )
    assert all(row["text"] is None for row in found if row["error"])


def test_a_row_that_the_engine_refuses_or_fails_on_is_an_error_row(job):
    job.write('prompt: "{{ word }}"')
    job.rows([{"word": "a"}, {"word": ""}, {"word": "poison"}, {"word": "b"}])
    assert job.run(stub=Stub(broken="poison")).status == 1
    messages = [row["error"] and row["error"]["message"] for row in job.results()]
    assert messages[0] is None and messages[3] is None
    assert messages[1] == "the prompt is empty: at least one character is needed."
    assert messages[2] == "the engine failed: RuntimeError: the device is on fire"


def test_an_engine_that_fails_on_every_row_stops_the_run(job):
    job.rows(WORDS)
    with pytest.raises(
        RunStopped,
        match="the engine fails on every row: RuntimeError: the device is on fire.*the same command",
    ):
        job.run(stub=Stub(broken="Say"))
    assert sorted(path.name for path in job.folder.iterdir()) == ["rows.jsonl", "run.yaml"]
    assert job.run().totals["failed"] == 0, "it was not the rows that failed"


def test_a_run_that_was_broken_off_goes_on_with_what_is_left(job, capsys):
    whole = broken_off(job, 100, view=View())
    said = capsys.readouterr().err
    assert (
        "interrupted: 100 finished rows are kept in " in said
        and "the same command goes on from there" in said
    )
    assert not job.output.exists() and len(job.partial.read_bytes().splitlines()) == 100
    stub = Counts()
    job.run(stub=stub, view=View())
    assert "going on after 100 finished rows" in capsys.readouterr().err
    assert (
        len(stub.asked) == len(set(stub.sampling_state)) == 200 and job.output.read_bytes() == whole
    )
    sessions = json.loads(job.record.read_text())["sessions"]
    assert len(sessions) == 2 and sessions[1]["rows"] == 200


DAMAGE = {  # what becomes of the lines of a journal, and how many rows that costs
    "a torn head": (lambda lines: [*lines, b'{"row":5,"in":1,"ou'], 0),
    "a torn output": (
        lambda lines: [*lines, b'{"row":9,"in":1,"out":2,"ok":true,"output":{"text":"ab'],
        0,
    ),
    "zeros at the end": (lambda lines: [*lines, b"\0" * 4096 + b"\n"], 0),
    "zeros in the middle": (lambda lines: [*lines[:40], b"\0" * 100 + b"\n", *lines[41:]], 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_in_a_journal_costs_its_own_row_alone(job, kind):
    damage, cost = DAMAGE[kind]
    whole = broken_off(job, 100)
    job.partial.write_bytes(b"".join(damage(job.partial.read_bytes().splitlines(keepends=True))))
    stub = Counts()
    job.run(stub=stub)
    assert len(stub.asked) == 200 + cost and job.output.read_bytes() == whole


def test_a_complete_run_is_not_made_again(job):
    job.rows([*WORDS[:3], {"wrd": 1}])
    assert job.run().worked
    again = job.run(stub=Stub(broken="Say"))
    assert not again.worked and again.status == 1 and again.totals["rows"] == 4
    with pytest.raises(jfp8kv.ConfigError, match="output.unordered was false, is true"):
        job.run("output.unordered=true")
    job.output.rename(job.folder / "elsewhere.jsonl")
    with pytest.raises(
        jfp8kv.ConfigError,
        match=r"out.jsonl: is not there, and was complete: put it back, or .*--restart",
    ):
        job.run()


def test_another_config_input_or_model_is_refused_with_what_changed(job):
    job.rows(WORDS)
    model = job.folder / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"0" * 100_000)
    named = f"model={model}"
    with pytest.raises(KeyboardInterrupt):
        job.run(named, stub=Stops(10))
    for changes, message in {
        ("seed=4",): r"config.seed was 0, is 4.*--restart",
        (
            "sampling.top_p=0.5",
            "prompt=Tell {{ word }}",
        ): r'config.sampling.top_p was null, is 0.5; config.prompt was "Say {{ wo',
        (
            "input.format=lines",
        ): r'config.input.format was "auto", is "lines"; input.format was "jsonl", is "lines"',
    }.items():
        with pytest.raises(jfp8kv.ConfigError, match=message):
            job.run(named, *changes)
    (model / "weights").write_bytes(b"0" * 99_999 + b"1")
    (model / ".of_a_download").touch()
    with pytest.raises(jfp8kv.ConfigError, match="same: model.weights.sha256_of_pieces was [^;]*$"):
        job.run(named)
    job.rows(WORDS[:-1])
    with pytest.raises(jfp8kv.ConfigError, match=r"input.bytes was \d+, is \d+; input.sha256 was"):
        job.run()
    assert job.run(restart=True).totals["rows"] == 299


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("engine.max_num_seqs=8", "engine.kv_cache_memory=1GiB")),
        (("sampling={logit_bias: {5: -1.0}}",), ()),  # JSON has no numbers as keys
        (("output.unordered=true",), ("output.unordered=false",)),
        ((), ("input=renamed.jsonl",)),
        (("model=.",), ()),  # where the run has its own files, too
    ],
)
def test_a_run_goes_on_where_no_text_depends_on_what_changed(job, monkeypatch, before, after):
    monkeypatch.chdir(job.folder)
    whole = broken_off(job, 10, *before)
    if "input=renamed.jsonl" in after:
        (job.folder / "rows.jsonl").rename("renamed.jsonl")
    stub = Counts()
    job.run(*before, *after, stub=stub)
    assert len(stub.asked) == 290 and sorted(job.output.read_bytes().splitlines()) == sorted(
        whole.splitlines()
    )


def test_what_no_run_made_is_not_replaced(job):
    job.rows(WORDS)
    job.output.write_text("precious\n")
    with pytest.raises(jfp8kv.ConfigError, match="is there already, and no run made it"):
        job.run()
    assert job.output.read_text() == "precious\n"
    job.output.unlink()
    job.partial.write_text("what?\n")
    with pytest.raises(jfp8kv.ConfigError, match="nobody knows what .*partial is of"):
        job.run()


def test_a_file_system_without_locks_is_not_taken_for_another_process(job, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    job.rows(WORDS)
    with pytest.raises(
        jfp8kv.NotSupported, match=r"out.jsonl.lock: cannot be locked \(No locks available\): give"
    ):
        job.run()


def test_an_input_that_ends_in_the_middle_keeps_what_is_finished(job, monkeypatch):
    from jfp8kv.batch import inputs

    job.rows(WORDS)
    whole = inputs._by_line

    def breaks(stream, read):
        for row in whole(stream, read):
            if row.number == 200:
                raise OSError(5, "Input/output error")
            yield row

    monkeypatch.setattr(inputs, "_by_line", breaks)
    with pytest.raises(
        RunStopped,
        match=r"cannot be read further: .*Input/output error.* 200 finished rows are kept",
    ):
        job.run("input.format=jsonl")
    monkeypatch.undo()
    assert job.run("input.format=jsonl").totals["rows"] == 300


def test_an_output_that_cannot_be_written_is_tried_again_from_what_is_finished(job, monkeypatch):
    job.rows(WORDS)

    def full(path, rows=None):
        if rows is not None:
            path.write_text("some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "_write_lines", full)
    with pytest.raises(
        RunStopped, match="all rows are finished, and .* cannot be written: No space left on device"
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
    assert not job.record.with_name("out.jsonl.run.json.new").exists()
    assert job.run(stub=Stub(broken="Say")).totals == {
        "rows": 300,
        "failed": 0,
        "prompt_tokens": 600,
        "completion_tokens": 4800,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '{"name": "a"}\n{"name": "b"}\n',
            r":1: the template wants 'word'.*There are name. None of the first 2 rows will do",
        ),
        (
            '{"word": "a", "text": "b"}\n',
            "has a field 'text', as the results do: give `output.prefix`",
        ),
        ("w\0o\0r\0d\0\n" * 20, r":1: is no JSON: .* None of the first 16 rows will do"),
        (
            '{"word": null}\n',
            r":1: the template meets a null, which is no text: say \{\{ field or '' \}\}",
        ),
    ],
)
def test_what_suits_no_row_is_a_mistake_found_before_the_engine_is_there(job, rows, message):
    (job.folder / "rows.jsonl").write_text(rows)
    with pytest.raises(jfp8kv.ConfigError, match=message):
        run(load(job.config), open_engine=lambda *_: pytest.fail("it is there"))
    assert sorted(path.name for path in job.folder.iterdir()) == ["rows.jsonl", "run.yaml"]


def test_a_prefix_keeps_results_apart_from_fields_of_their_names(job):
    job.write('prompt: "{{ text }}"')
    job.rows([{"text": "a"}])
    job.run("output.prefix=new_")
    (row,) = job.results()
    assert row["text"] == "a" and len(row["new_text"]) == 16 and row["new_error"] is None


def test_rows_that_fit_no_table_are_kept_and_made_json_lines_without_running_again(job):
    job.write(out="out.parquet")
    job.rows([*WORDS[:5], {"word": "a", "id": 2**70}])
    with pytest.raises(
        RunStopped,
        match="all rows are finished, .* the rows fit no one table .*`--set output.format=jsonl`",
    ):
        job.run()
    job.run("output.format=jsonl", stub=Stub(broken="Say"))
    assert [row["id"] for row in job.results()] == [*range(5), 2**70]


def test_log_probabilities_and_several_continuations_are_kept(job):
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
def test_shards_are_parts_of_the_whole_run_and_merged_they_are_it(job, out):
    job.write(out=out)
    job.rows([*WORDS[:50], {"wrd": 1}, *WORDS[50:]])
    job.run()
    whole, rows = (
        job.output.read_bytes(),
        [row.fields() for row in Reader(File(path=str(job.output)))],
    )
    job.output.unlink(), Paths(job.output).record.unlink()
    for i in range(3):
        outcome = job.run(f"shard=[{i},3]")
        part = [row.fields() for row in Reader(File(path=str(outcome.output)))]
        assert outcome.output.name == out.replace(".", f".{i}-of-3.") and len(part) == len(
            rows[i::3]
        )
        assert [row["text"] for row in part] == [row["text"] for row in rows[i::3]]
    totals = merge(load(job.config))
    assert job.output.read_bytes() == whole if out == "out.jsonl" else True
    assert [row.fields() for row in Reader(File(path=str(job.output)))] == rows
    assert (totals["rows"], totals["failed"]) == (301, 1)
    assert not job.run().worked, "it is the output of one run"


def test_shards_that_are_missing_unfinished_or_of_another_run_are_not_merged(job):
    job.rows(WORDS)
    with pytest.raises(jfp8kv.ConfigError, match="out.I-of-N.jsonl: there is no output of a shard"):
        merge(load(job.config))
    job.run("shard=[0,2]")
    with pytest.raises(
        jfp8kv.ConfigError, match="out.1-of-2.jsonl: is not there; 1 of 2 shards are finished"
    ):
        merge(load(job.config))
    other = job.run("shard=[1,2]", "seed=5")
    with pytest.raises(
        jfp8kv.ConfigError, match="out.1-of-2.jsonl: is not of the run of .*config.seed was 0, is 5"
    ):
        merge(load(job.config))
    Paths(other.output).record.unlink()
    with pytest.raises(jfp8kv.ConfigError, match="nobody knows whether .*1-of-2.jsonl is whole"):
        merge(load(job.config))
    job.run("shard=[2,3]")
    with pytest.raises(
        jfp8kv.ConfigError,
        match=r"there are outputs of 2 and of 3 shards: say which with --set shard=\[0,N\]",
    ):
        merge(load(job.config))
    job.output.write_text("precious")
    with pytest.raises(jfp8kv.ConfigError, match="is there already"):
        merge(load(job.config))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt"])
def test_the_same_rows_in_every_format_give_the_same_texts(job, name):
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
    assert job.run().totals["rows"] == 0 and job.output.read_bytes() == b""
