"""`python -m benchmarks.gpu`: a dry run of every part, and its safeguards."""

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
from benchmarks._gpu import checks, engine, goals, peers, problems, random_batches, tune
from benchmarks._gpu.session import Session, results_path
from benchmarks._gpu.timing import Clock, Work
from pallas_kernels import DecodeBlocks, PrefillBlocks, tuning
from pallas_kernels.error_bound import paged_decode_reference
from pallas_kernels.paged_decode import blocks as decode_blocks
from pallas_kernels.testing import as_view


@pytest.fixture
def session(tmp_path) -> Session:
    clock = Clock(calls=2, repeats=1)
    session = Session(tmp_path / "results.json", clock, True, time.perf_counter() + 60)
    session.begin("a part", 1.0)
    return session


@pytest.mark.quick_compile
def test_a_dry_run_completes_and_writes_results(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    facts = json.loads(path.read_text())
    assert set(facts) >= {"device", "versions", "commit", "rows", "copy_bytes_s", "tuned", "goals"}
    assert {row["part"] for row in facts["rows"]} == set(gpu.PARTS) - set(gpu.OPTIONAL)
    assert all(row["correct"] for row in facts["rows"] if "correct" in row)
    ours = [row for row in facts["rows"] if row["part"] not in ("device", "peers")]
    assert not [row for row in ours if "skipped" in row]
    measured = [goal["name"] for goal in facts["goals"] if goal["measured"] is not None]
    # Kernels of other libraries may be missing.
    assert len(measured) >= len(facts["goals"]) - 1, f"only {measured}"
    assert "a dry run measures nothing" in capsys.readouterr().out


def test_the_gap_of_a_token_is_its_distance_to_the_top_logit():
    logits = np.array([[9.0, 0, 0], [0, 4, 3], [1, 2, -8], [5, 5, 5]])
    assert engine.largest_gap(logits, [0, 0, 1, 1], prompt=2) == 0
    assert engine.largest_gap(logits, [0, 0, 2, 1], prompt=2) == 0.25, "1 / 4"


def test_without_a_gpu_the_error_names_the_dry_run(capsys):
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["last row", "NaN", "nothing"])
def test_a_wrong_kernel_is_not_timed_and_the_run_fails(session, spoil):
    batch = random_batches.Case("plain", "paged_decode", "e4m3", checks.DRY_RUN_SIZES).batch(0)
    expected, _ = paged_decode_reference(**as_view(batch.arrays), element=batch.dtype)

    def program(arrays):
        out = np.array(expected)
        if spoil != "nothing":
            out[-1, 0, 0] = np.nan if spoil == "NaN" else out[-1, 0, 0] + 0.1
        return out

    checks.check(session, batch, program)
    wrong = spoil != "nothing"
    assert session.failed == wrong
    assert session.may_time("paged_decode", "e4m3", "paged_decode") != wrong
    assert not session.may_time("paged_prefill", "e4m3", "paged_prefill"), "not checked"


def test_a_kernel_with_one_wrong_result_stays_wrong(session):
    for error in (0.5, 1.5, 0.5):
        session.judge("paged_decode", "e4m3", "a case", error)
    assert not session.correct["paged_decode", "e4m3"] and session.failed


def test_a_kernel_that_does_not_compile_fails_the_run(session):
    batch = random_batches.Case("plain", "paged_decode", "bf16", checks.DRY_RUN_SIZES).batch(0)
    checks.check(session, batch, ValueError("no"))
    assert session.failed and not session.correct["paged_decode", "bf16"]


def test_unwritten_slots_are_nan():
    batch = random_batches.Case("plain", "paged_prefill", "e4m3", checks.DRY_RUN_SIZES).batch(3)
    values = batch.arrays["k_pages"].view(batch.dtype).astype(np.float32)
    assert (
        np.isfinite(values).sum()
        == sum(checks.DRY_RUN_SIZES.lengths)
        * checks.DRY_RUN_SIZES.kv_heads
        * checks.DRY_RUN_SIZES.head_dim
    )
    assert np.isnan(values[: batch.first_row]).all(), "the other layer"


def test_items_without_time_are_recorded_as_skipped(session):
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
    """A fake CUPTI: every call runs kernels of these milliseconds."""

    def __init__(self, kernels: list[float]):
        self.kernels, self.calls = kernels, 0

    def _cupti_init(self) -> None:
        self.calls = 0

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        return [("a kernel", ms) for _ in range(self.calls) for ms in self.kernels]


def test_cupti_sums_the_kernels_of_a_call(monkeypatch):
    recorder = Recorder([0.25, 0.5])
    copies = []

    def program(carry, rest, copy):
        recorder.calls += 1
        copies.append(int(copy))
        return carry

    clock = Clock(calls=3, repeats=2)
    clock._cupti = recorder
    taken = clock.time(Work(lambda *_: None, copies=3), program, jnp.zeros(1), None)
    assert (taken.median, taken.clock, taken.kernels) == (pytest.approx(0.75e-3), "cupti", 2)
    assert copies[2:] == [0, 1, 2, 0, 1, 2], "two warm-up calls, then all copies in order"


def test_loops_are_timed_if_cupti_records_nothing():
    clock = Clock(calls=2, repeats=2, cupti=Recorder([]))
    assert clock.name == "loop" and "CUPTI" in clock.reason
    work, carry = Work(lambda carry, rest, copy: carry * 2 + copy, copies=2), jnp.ones(4, jnp.int32)
    program = clock.lower(work, jax.eval_shape(lambda: carry), None).compile()
    assert program(carry, None).tolist() == [(1 * 2 + 0) * 2 + 1] * 4, (
        "each call takes the previous result and the next copy"
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
            "print('ready', flush=True); input(); "
            'print(\'{"what": "x", "us": 2.0}\', flush=True)',
            None,
        ),
        ("raise SystemExit(3)", "status 3"),
        ("import time; print('ready', flush=True); time.sleep(60)", "no results after"),
    ],
)
def test_a_peer_returns_rows_or_times_out(session, code, error):
    peer(session, code)
    process = session.processes["a peer"]
    try:
        if error is None:
            assert peers.read_rows(process, 20) == [{"what": "x", "us": 2.0}]
        else:
            with pytest.raises((RuntimeError, TimeoutError), match=error):
                peers.read_rows(process, 1 if "sleep" in code else 20)
    finally:
        session.end_processes()


def test_goals_are_met_not_met_or_not_measured():
    assert goals.Goal("x", 0.9, minimum=0.85).status == "met"
    assert goals.Goal("x", 4.5, maximum=4.0).status == "NOT MET"
    assert goals.Goal("x", None, maximum=4.0).status == "not measured"
    assert goals.ratio({"us": 3.0}, {"us": 2.0}) == 1.5 and goals.ratio(None, {"us": 2.0}) is None


SIZES = {"requests": 64, "kv_heads": 8, "group": 4, "head_dim": 128}


def test_tuned_blocks_take_precedence_over_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "table_path", lambda kernel: tmp_path / f"{kernel}.json")
    element, compute = np.dtype(random_batches.ELEMENTS["e4m3"]), np.dtype(np.float16)
    found = DecodeBlocks(block_k=128, warps=8, stages=5, splits=7)
    problem = decode_blocks.decode_key(**SIZES, element=element)
    device = jax.devices()[0].device_kind
    given = {"paged_decode": {device: {problem: dataclasses.asdict(found)}}}
    tuning.read_table.cache_clear()
    sizes = SIZES | {"element": element, "compute": compute}
    rule = decode_blocks.choose_blocks(**sizes, tokens=8192)
    tune.publish(given, path=tuning.table_path)
    try:
        assert decode_blocks.choose_blocks(**sizes, tokens=8192) == found != rule
        short = decode_blocks.choose_blocks(**sizes, tokens=200)
        assert short == dataclasses.replace(found, splits=2), "no more splits than blocks of keys"
        other = decode_blocks.choose_blocks(**sizes | {"requests": 1}, tokens=8192)
        assert other.block_k == rule.block_k, "a problem that was not tuned uses the rule"
    finally:
        tuning.read_table.cache_clear()


def test_every_shipped_table_has_valid_blocks():
    for kernel, blocks in {"paged_decode": DecodeBlocks, "paged_prefill": PrefillBlocks}.items():
        assert all(
            blocks(**found)
            for device in tuning.read_table(kernel).values()
            for found in device.values()
        )


def test_publishing_preserves_other_devices_and_problems(tmp_path):
    def path(kernel: str) -> Path:
        return tmp_path / f"{kernel}.json"

    tune.publish({"paged_decode": {"A": {"x": {"warps": 1}}, "B": {"x": {"warps": 2}}}}, path=path)
    tune.publish({"paged_decode": {"A": {"y": {"warps": 4}}}}, path=path)
    assert json.loads(path("paged_decode").read_text()) == {
        "A": {"x": {"warps": 1}, "y": {"warps": 4}},
        "B": {"x": {"warps": 2}},
    }


def test_blocks_with_the_smallest_worst_case_slowdown_are_chosen():
    times = {
        "short": {"a": 1.0, "b": 1.2, None: 3.0},
        "long": {"a": 9.0, "b": 4.4, "c": 4.0, None: 8.0},
    }
    assert tune.minimax_blocks(times) == "b"


def test_block_sizes_of_a_dry_run_are_not_adopted(tmp_path, capsys):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"dry_run": True, "tuned": {"paged_decode": {"cpu": {}}}}))
    assert gpu.main(["--adopt", str(path)]) == 2
    assert "no tuned block sizes" in capsys.readouterr().out


def test_choices_nearest_to_the_first_are_tried_first():
    tried = tune.choices({"block_k": [64, 32], "warps": [2, 1, 4]})
    assert tried[0] == {"block_k": 64, "warps": 2} and len(tried) == 6
    assert SimpleNamespace(**tried[-1]) == SimpleNamespace(block_k=32, warps=4)


def test_blocks_with_other_results_are_not_chosen(session, monkeypatch):
    problem = problems.Attention(
        problems.Shape("s", 2, 48, 4, 2, 16, 16), "e4m3", problems.TENSOR, False, 20_000, True
    )
    expected = jnp.ones((2, 4, 16), jnp.bfloat16)
    wrong = DecodeBlocks(block_k=32, warps=2, stages=3, splits=2)
    monkeypatch.setattr(tune, "candidates", lambda *_: [None, wrong])
    programs = {
        None: lambda carry, rest: expected,
        wrong: lambda carry, rest: expected.at[0, 0, 0].set(9),
    }
    monkeypatch.setattr(
        tune, "compile_all", lambda session, some, size: {v: programs[v.blocks] for v in some}
    )
    assert set(tune.time_candidates(session, problem, {"compilers": 2})) == {None}
    assert session.failed and "wrong by" in session.facts["rows"][0]["skipped"]
