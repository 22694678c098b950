"""`python -m benchmarks.gpu`: every line of it runs without a GPU, and what it must not do it does not."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from benchmarks._gpu import batches, checks, engine, goals, peers, problems, tune
from benchmarks._gpu.session import Session, results_path
from benchmarks._gpu.timing import Clock, Work
from pallas_kernels import DecodeBlocks, PrefillBlocks
from pallas_kernels import tuned as tables
from pallas_kernels.paged_decode import blocks as decode_blocks
from pallas_kernels.paged_decode.reference import paged_decode_reference


@pytest.fixture
def session(tmp_path) -> Session:
    made = Session(
        tmp_path / "results.json", Clock(calls=2, repeats=1), True, time.perf_counter() + 60
    )
    made.begin("a part", 1.0)
    return made


@pytest.mark.quick_compile
def test_a_dry_run_reaches_its_end_and_leaves_results(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    facts = json.loads(path.read_text())
    assert set(facts) >= {"device", "versions", "commit", "rows", "copy_bytes_s", "tuned", "goals"}
    assert {row["part"] for row in facts["rows"]} == set(gpu.PARTS) - set(gpu.ASKED_FOR)
    assert all(row["right"] for row in facts["rows"] if "right" in row)
    ours = [row for row in facts["rows"] if row["part"] not in ("device", "peers")]
    assert not [row for row in ours if "skipped" in row]
    measured = [goal["what"] for goal in facts["goals"] if goal["got"] is not None]
    assert len(measured) >= len(facts["goals"]) - 1, (
        f"of all goals only {measured}"
    )  # other people's kernels may be absent
    assert "a dry run measures nothing" in capsys.readouterr().out


def test_a_token_that_is_not_the_likeliest_is_behind_by_its_gap():
    logits = np.array([[9.0, 0, 0], [0, 4, 3], [1, 2, -8], [5, 5, 5]])
    assert engine.behind(logits, text=[0, 0, 1, 1], prompt=2) == 0
    assert engine.behind(logits, text=[0, 0, 2, 1], prompt=2) == 0.25, "one of four"


def test_without_a_gpu_it_says_what_to_do(capsys):
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["last row", "NaN", "nothing"])
def test_a_wrong_kernel_is_not_timed_and_the_run_fails(session, spoil):
    batch = checks.Case("plain", "paged_decode", "e4m3", checks.DRY).batch(0)
    right, _ = paged_decode_reference(**batch.arrays, element=batch.dtype)

    def program(arrays):
        out = np.array(right)
        if spoil != "nothing":
            out[-1, 0, 0] = np.nan if spoil == "NaN" else out[-1, 0, 0] + 0.1
        return out

    checks.check(session, batch, program)
    wrong = spoil != "nothing"
    assert session.failed == wrong
    assert session.may_time("paged_decode", "e4m3", "paged_decode") != wrong
    assert not session.may_time("paged_prefill", "e4m3", "paged_prefill"), "it was not checked"


def test_a_kernel_wrong_once_stays_wrong(session):
    for error in (0.5, 1.5, 0.5):
        session.judge("paged_decode", "e4m3", "a case", error)
    assert not session.right["paged_decode", "e4m3"] and session.failed


def test_a_kernel_that_does_not_compile_fails_the_run(session):
    batch = checks.Case("plain", "paged_decode", "bf16", checks.DRY).batch(0)
    checks.check(session, batch, ValueError("no"))
    assert session.failed and not session.right["paged_decode", "bf16"]


def test_slots_that_nobody_sees_hold_nan():
    batch = checks.Case("plain", "paged_prefill", "e4m3", checks.DRY).batch(3)
    values = batch.arrays["k_pages"].view(batch.dtype).astype(np.float32)
    assert (
        np.isfinite(values).sum()
        == sum(checks.DRY.lengths) * checks.DRY.kv_heads * checks.DRY.head_dim
    )
    assert np.isnan(values[: batch.first_row]).all(), "the other layer"


def test_what_no_time_is_left_for_becomes_a_row(session):
    done = []
    for item in session.each(range(4)):
        done.append(item)
        session.part_ends = time.perf_counter() + (100 if item == 0 else -1)
    assert done == [0, 1]
    assert [row["what"] for row in session.facts["rows"] if row["skipped"] == "no time left"] == [
        "2",
        "3",
    ]


def test_results_are_never_overwritten(tmp_path):
    first = results_path(tmp_path, "NVIDIA H100 80GB HBM3")
    first.write_text("{}")
    assert first.name.startswith("nvidia-h100-80gb-hbm3-2")
    assert results_path(tmp_path, "NVIDIA H100 80GB HBM3") != first


class Recorder:
    """CUPTI as the clock uses it: `kernels` of some milliseconds at every call."""

    def __init__(self, kernels: list[float]):
        self.kernels, self.calls = kernels, 0

    def _cupti_init(self) -> None:
        self.calls = 0

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        return [("a kernel", ms) for _ in range(self.calls) for ms in self.kernels]


def test_cupti_adds_up_the_kernels_of_a_call(monkeypatch):
    recorder = Recorder([0.25, 0.5])
    turns = []

    def program(carry, rest, turn):
        recorder.calls += 1
        turns.append(int(turn))
        return carry

    clock = Clock(calls=3, repeats=2)
    clock._cupti = recorder
    taken = clock.time(Work(lambda *_: None, turns=3), program, jnp.zeros(1), None)
    assert (taken.median, taken.by, taken.kernels) == (pytest.approx(0.75e-3), "cupti", 2)
    assert turns[2:] == [0, 1, 2, 0, 1, 2], "two calls that are not counted, then in turn"


def test_where_cupti_sees_nothing_loops_are_timed():
    clock = Clock(calls=2, repeats=2, cupti=Recorder([]))
    assert clock.by == "loop" and "CUPTI" in clock.why
    work, carry = Work(lambda carry, rest, turn: carry * 2 + turn, turns=2), jnp.ones(4, jnp.int32)
    program = clock.lower(work, jax.eval_shape(lambda: carry), None).compile()
    assert program(carry, None).tolist() == [(1 * 2 + 0) * 2 + 1] * 4, (
        "each call takes the last one's result and the next turn"
    )
    assert clock.time(work, program, carry, None).median > 0


def peer(session: Session, code: str) -> None:
    session.processes["a peer"] = peers.subprocess.Popen(
        [sys.executable, "-c", code], **peers.PIPES
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            'print(\'ready\', flush=True); input(); print(\'{"what": "x", "us": 2.0}\', flush=True)',
            None,
        ),
        ("raise SystemExit(3)", "status 3"),
        ("import time; print('ready', flush=True); time.sleep(60)", "not done after"),
    ],
)
def test_a_peer_answers_or_is_given_up(session, code, error):
    peer(session, code)
    process = session.processes["a peer"]
    try:
        if error is None:
            assert peers.answers(process, 20) == [{"what": "x", "us": 2.0}]
        else:
            with pytest.raises((RuntimeError, TimeoutError), match=error):
                peers.answers(process, 1 if "sleep" in code else 20)
    finally:
        session.end_processes()


def test_goals_say_met_not_met_and_not_measured():
    assert goals.Goal("x", 0.9, least=0.85).met == "met"
    assert goals.Goal("x", 4.5, most=4.0).met == "NOT MET"
    assert goals.Goal("x", None, most=4.0).met == "not measured"
    assert goals.ratio({"us": 3.0}, {"us": 2.0}) == 1.5 and goals.ratio(None, {"us": 2.0}) is None


SIZES = {"requests": 64, "kv_heads": 8, "group": 4, "head_dim": 128}


def test_tuned_blocks_come_before_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "path_of", lambda kernel: tmp_path / f"{kernel}.json")
    element, compute = np.dtype(batches.ELEMENTS["e4m3"]), np.dtype(np.float16)
    found = DecodeBlocks(block_k=128, warps=8, stages=5, splits=7)
    problem = decode_blocks.problem_class(**SIZES, element=element)
    device = jax.devices()[0].device_kind
    given = {"paged_decode": {device: {problem: dataclasses.asdict(found)}}}
    tables.read.cache_clear()
    more = {"element": element, "page_size": 64}
    rule = decode_blocks.blocks_for(**SIZES, **more, tokens=8192, compute=compute)
    tune.publish(given, path=tables.path_of)
    try:
        assert (
            decode_blocks.blocks_for(**SIZES, **more, tokens=8192, compute=compute) == found != rule
        )
        short = decode_blocks.blocks_for(**SIZES, **more, tokens=200, compute=compute)
        assert short == dataclasses.replace(found, splits=2), "no more parts than blocks of keys"
        other = decode_blocks.blocks_for(
            **SIZES | {"requests": 1}, **more, tokens=8192, compute=compute
        )
        assert other.block_k == rule.block_k, "a class that was not tried goes by the rule"
    finally:
        tables.read.cache_clear()


def test_every_shipped_table_is_made_of_blocks():
    for kernel, blocks in {"paged_decode": DecodeBlocks, "paged_prefill": PrefillBlocks}.items():
        assert all(
            blocks(**found) for device in tables.read(kernel).values() for found in device.values()
        )


def test_publishing_keeps_what_is_known_of_other_devices_and_classes(tmp_path):
    def path(kernel: str) -> Path:
        return tmp_path / f"{kernel}.json"

    tune.publish({"paged_decode": {"A": {"x": {"warps": 1}}, "B": {"x": {"warps": 2}}}}, path=path)
    tune.publish({"paged_decode": {"A": {"y": {"warps": 4}}}}, path=path)
    assert json.loads(path("paged_decode").read_text()) == {
        "A": {"x": {"warps": 1}, "y": {"warps": 4}},
        "B": {"x": {"warps": 2}},
    }


def test_the_fairest_blocks_win_among_problems_of_a_class():
    times = {
        "short": {"a": 1.0, "b": 1.2, None: 3.0},
        "long": {"a": 9.0, "b": 4.4, "c": 4.0, None: 8.0},
    }
    assert tune.fairest(times) == "b"


def test_block_sizes_of_a_dry_run_are_not_taken_over(tmp_path, capsys):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"dry_run": True, "tuned": {"paged_decode": {"cpu": {}}}}))
    assert gpu.main(["--adopt", str(path)]) == 2
    assert "no block sizes" in capsys.readouterr().out


def test_the_nearest_choices_are_tried_first():
    tried = tune.choices({"block_k": [64, 32], "warps": [2, 1, 4]})
    assert tried[0] == {"block_k": 64, "warps": 2} and len(tried) == 6
    assert SimpleNamespace(**tried[-1]) == SimpleNamespace(block_k=32, warps=4)


def test_blocks_that_give_other_results_are_not_chosen(session, monkeypatch):
    one = problems.Attention(
        problems.Shape("s", 2, 48, 4, 2, 16, 16), "e4m3", problems.TENSOR, False, 20_000, True
    )
    right = jnp.ones((2, 4, 16), jnp.bfloat16)
    wrong = DecodeBlocks(block_k=32, warps=2, stages=3, splits=2)
    monkeypatch.setattr(tune, "candidates", lambda *_: [None, wrong])
    programs = {
        None: lambda carry, rest: right,
        wrong: lambda carry, rest: right.at[0, 0, 0].set(9),
    }
    monkeypatch.setattr(
        tune, "compile_all", lambda session, some, size: {v: programs[v.blocks] for v in some}
    )
    assert set(tune.tried(session, one, {"compilers": 2})) == {None}
    assert session.failed and "wrong by" in session.facts["rows"][0]["skipped"]
