"""Runs over a stub: each row once and in order, what is wrong with one told beside it, going on, and being refused to."""

import json

import pytest

import jfp8kv
from jfp8kv.batch import outputs
from jfp8kv.batch.check import load
from jfp8kv.batch.config import File
from jfp8kv.batch.inputs import Reader
from jfp8kv.batch.merge import merge
from jfp8kv.batch.plain import row_seed
from jfp8kv.batch.record import Paths
from jfp8kv.batch.run import RunStopped
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


def test_rows_come_out_in_order_with_their_fields_and_results(job):
    job.rows(WORDS)
    outcome = job.run()
    found = job.results()
    assert [{"word": row["word"], "id": row["id"]} for row in found] == WORDS
    assert found[7].keys() == {"word", "id", "text", "prompt_tokens", "completion_tokens", "finish_reason", "error"}
    assert (found[7]["prompt_tokens"], found[7]["completion_tokens"], found[7]["error"]) == (2, 16, None)
    assert outcome.status == 0 and outcome.totals == {"rows": 300, "failed": 0, "prompt_tokens": 600, "completion_tokens": 4800}
    assert sorted(path.name for path in job.folder.iterdir()) == ["out.jsonl", "out.jsonl.run.json", "rows.jsonl", "run.yaml"]


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
    assert sorted(job.output.read_bytes().splitlines()) == sorted(ordered) != job.output.read_bytes().splitlines()


def test_a_rows_seed_depends_on_the_runs_seed_and_its_number_alone():
    seeds = {row_seed(seed, number) for seed in range(3) for number in range(100)}
    assert len(seeds) == 300 and all(0 <= seed < 2**64 for seed in seeds)
    assert row_seed(0, 0) == 11807284506806067046  # kept: another one would change every text ever made


def test_a_bad_row_is_an_error_row_with_its_line_and_the_others_run(job):
    good = '{"word": "x"}\n'
    (job.folder / "rows.jsonl").write_bytes(
        f'{good}\nnope\n[1]\n{{"wrd": 1}}\n'.encode() + b'{"word": "\xff"}\n' + good.encode()
    )
    assert job.run().status == 1
    found = job.results()
    assert [row["error"] and row["error"]["line"] for row in found] == [None, 3, 4, 5, 6, None]
    messages = [row["error"]["message"] for row in found if row["error"]]
    assert messages[0].startswith("is no JSON") and "type list" in messages[1] and "no UTF-8" in messages[3]
    assert "wants 'word'" in messages[2] and "Did you mean 'wrd'" in messages[2] and found[3]["wrd"] == 1
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
        RunStopped, match="the engine fails on every row: RuntimeError: the device is on fire.*the same command"
    ):
        job.run(stub=Stub(broken="Say"))
    assert sorted(path.name for path in job.folder.iterdir()) == ["rows.jsonl", "run.yaml"]
    assert job.run().totals["failed"] == 0, "it was not the rows that failed"


def test_a_run_that_was_broken_off_goes_on_with_what_is_left(job, capsys):
    job.rows(WORDS)
    job.run()
    whole = job.output.read_bytes()
    job.output.unlink(), job.record.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(stub=Stops(100), view=View())
    said = capsys.readouterr().err
    assert "interrupted: 100 finished rows are kept in " in said and "the same command goes on from there" in said
    assert not job.output.exists() and len(job.partial.read_bytes().splitlines()) == 100
    asked = []

    class Counts(Stub):
        def _answer(self, request):
            asked.append(request.prompt)
            return super()._answer(request)

    job.run(stub=Counts(), view=View())
    assert "going on after 100 finished rows" in capsys.readouterr().err
    assert len(asked) == len(set(asked)) == 200 and job.output.read_bytes() == whole
    sessions = json.loads(job.record.read_text())["sessions"]
    assert len(sessions) == 2 and sessions[1]["rows"] == 200


@pytest.mark.parametrize(
    "tail", [b'{"row":5,"in":1,"ou', b"\0" * 4096 + b"\n", b'{"row":9,"in":1,"out":2,"ok":true,"output":{"text":"ab']
)
def test_a_torn_tail_is_cut_off(job, tail):
    job.rows(WORDS)
    job.run()
    whole = job.output.read_bytes()
    job.output.unlink(), job.record.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(stub=Stops(50))
    with job.partial.open("ab") as file:
        file.write(tail)
    job.run()
    assert job.output.read_bytes() == whole


def test_a_damaged_line_costs_its_own_row_alone(job):
    job.rows(WORDS)
    job.run()
    whole = job.output.read_bytes()
    job.output.unlink(), job.record.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(stub=Stops(100))
    lines = job.partial.read_bytes().splitlines(keepends=True)
    lines[40] = b"\0" * (len(lines[40]) - 1) + b"\n"
    job.partial.write_bytes(b"".join(lines))
    asked = []

    class Counts(Stub):
        def _answer(self, request):
            asked.append(request.prompt)
            return super()._answer(request)

    job.run(stub=Counts())
    assert len(asked) == 201 and job.output.read_bytes() == whole


def test_a_complete_run_is_not_made_again(job):
    job.rows([*WORDS[:3], {"wrd": 1}])
    assert job.run().worked
    again = job.run(stub=Stub(broken="Say"))
    assert not again.worked and again.status == 1 and again.totals["rows"] == 4


def test_another_config_or_input_is_refused_with_what_changed(job):
    job.rows(WORDS)
    with pytest.raises(KeyboardInterrupt):
        job.run(stub=Stops(10))
    with pytest.raises(jfp8kv.ConfigError, match=r"config.seed was 0, is 4.*--restart"):
        job.run("seed=4")
    with pytest.raises(
        jfp8kv.ConfigError, match=r'config.sampling.top_p was null, is 0.5; config.prompt was "Say {{ word }}", is'
    ):
        job.run("sampling.top_p=0.5", "prompt=Tell {{ word }}")
    job.rows(WORDS[:-1])
    with pytest.raises(jfp8kv.ConfigError, match=r"input.bytes was \d+, is \d+; input.sha256 was"):
        job.run()
    assert job.run(restart=True).totals["rows"] == 299


def test_limits_of_the_engine_may_change_when_a_run_goes_on(job):
    job.rows(WORDS)
    with pytest.raises(KeyboardInterrupt):
        job.run(stub=Stops(10))
    assert job.run("engine.max_num_seqs=8", "engine.kv_cache_memory=1GiB").totals["rows"] == 300


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
    with pytest.raises(RunStopped, match=r"cannot be read further: .*Input/output error.* 200 finished rows are kept"):
        job.run("input.format=jsonl")
    monkeypatch.undo()
    assert job.run("input.format=jsonl").totals["rows"] == 300


def test_an_output_that_cannot_be_written_is_tried_again_from_what_is_finished(job, monkeypatch):
    job.rows(WORDS)

    def full(path, rows):
        path.write_text("some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "_write_lines", full)
    with pytest.raises(RunStopped, match="all rows are finished, and .* cannot be written: No space left on device"):
        job.run()
    assert not job.output.exists() and not job.output.with_name("out.jsonl.new").exists()
    monkeypatch.undo()
    assert job.run(stub=Stub(broken="Say")).totals == {
        "rows": 300,
        "failed": 0,
        "prompt_tokens": 600,
        "completion_tokens": 4800,
    }


def test_a_template_that_suits_no_row_is_a_mistake_found_before_the_engine_is_there(job):
    job.rows([{"name": "a"}, {"name": "b"}])
    with pytest.raises(
        jfp8kv.ConfigError, match=r"rows.jsonl:1: the template wants 'word'.*There are name. The same .* first 2"
    ):
        job.run(stub=None)


def test_a_field_named_like_a_result_is_a_mistake_and_a_prefix_the_way_out(job):
    job.write('prompt: "{{ text }}"')
    job.rows([{"text": "a"}])
    with pytest.raises(jfp8kv.ConfigError, match="has a field 'text', as the results do: give `output.prefix`"):
        job.run()
    job.run("output.prefix=new_")
    (row,) = job.results()
    assert row["text"] == "a" and len(row["new_text"]) == 16 and row["new_error"] is None


def test_log_probabilities_and_several_continuations_are_kept(job):
    job.rows(WORDS[:1])
    job.run("sampling={logprobs: 1, n: 2, max_tokens: 16}")
    (row,) = job.results()
    assert len(row["text"]) == len(row["logprobs"]) == 2 and row["text"][0] != row["text"][1]
    first = row["logprobs"][0][0]
    assert first == {"token_id": ord(row["text"][0][0]), "token": row["text"][0][0], "logprob": -0.5} | {"top": first["top"]}
    assert {"token_id": 0, "token": "\0", "logprob": -1.5} in first["top"] and row["completion_tokens"] == [16, 16]


def test_completions_are_scored(job):
    job.write('task: score\nprompt: "{{ question }}"\ncompletion: " {{ answer }}"')
    job.rows([{"question": "how far ?", "answer": "a mile"}, {"question": "no answer"}])
    assert job.run().status == 1
    good, bad = job.results()
    assert (good["logprob"], good["logprobs"], good["prompt_tokens"], good["completion_tokens"]) == (-5.0, [-1.0, -4.0], 3, 2)
    assert good["question"] == "how far ?" and bad["logprob"] is None and "'answer'" in bad["error"]["message"]


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_shards_are_parts_of_the_whole_run_and_merged_they_are_it(job, out):
    job.write(out=out)
    job.rows([*WORDS[:50], {"wrd": 1}, *WORDS[50:]])
    job.run()
    whole, rows = job.output.read_bytes(), [row.fields() for row in Reader(File(path=str(job.output)))]
    job.output.unlink(), Paths(job.output).record.unlink()
    for i in range(3):
        outcome = job.run(f"shard=[{i},3]")
        part = [row.fields() for row in Reader(File(path=str(outcome.output)))]
        assert outcome.output.name == out.replace(".", f".{i}-of-3.") and len(part) == len(rows[i::3])
        assert [row["text"] for row in part] == [row["text"] for row in rows[i::3]]
    totals = merge(load(job.config))
    assert job.output.read_bytes() == whole if out == "out.jsonl" else True
    assert [row.fields() for row in Reader(File(path=str(job.output)))] == rows
    assert (totals["rows"], totals["failed"]) == (301, 1)


def test_shards_that_are_missing_unfinished_or_of_another_run_are_not_merged(job):
    job.rows(WORDS)
    with pytest.raises(jfp8kv.ConfigError, match="out.I-of-N.jsonl: there are outputs none"):
        merge(load(job.config))
    job.run("shard=[0,2]")
    with pytest.raises(jfp8kv.ConfigError, match="out.1-of-2.jsonl: is not there; 1 of 2 shards are finished"):
        merge(load(job.config))
    other = job.run("shard=[1,2]", "seed=5")
    with pytest.raises(jfp8kv.ConfigError, match="out.1-of-2.jsonl: is not of the run of .*config.seed was 0, is 5"):
        merge(load(job.config))
    Paths(other.output).record.unlink()
    with pytest.raises(jfp8kv.ConfigError, match="nobody knows whether .*1-of-2.jsonl is whole"):
        merge(load(job.config))
    job.run("shard=[2,3]")
    with pytest.raises(jfp8kv.ConfigError, match=r"there are outputs of 2 and of 3 shards: say which with --set shard=\[0,N\]"):
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
