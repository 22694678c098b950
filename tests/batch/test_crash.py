"""Killed, concurrent and very long runs, and a full disk: each run is a program.

`JFP8KV_CRASHES=50` sets the number of kills; the default is 10.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.batch.conftest import Job

CRASHES = int(os.environ.get("JFP8KV_CRASHES", "10"))
ROWS = [{"word": f"w{i}", "id": i, "more": "x" * (i % 50)} for i in range(max(1500, 150 * CRASHES))]
STEP_S = 0.002


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], patience_s: float = 60
) -> None:
    """Wait until the condition holds or the process ends."""
    until = time.monotonic() + patience_s
    while not condition() and process.poll() is None:
        assert time.monotonic() < until, "timed out"
        time.sleep(0.001)


def kill(process: subprocess.Popen[str]) -> bool:
    """Kill a process; return whether it was still alive."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def ended(process: subprocess.Popen[str], patience_s: float = 120) -> tuple[int, str]:
    """Wait for a process; return its exit status and stderr."""
    _, err = process.communicate(timeout=patience_s)
    return process.returncode, err


def expected_output(job: Job) -> bytes:
    """Return the output of an uninterrupted run, and remove its files."""
    job.run()
    output = job.output.read_bytes()
    job.output.unlink()
    job.manifest.unlink()
    return output


def lines(job: Job) -> int:
    return job.partial.read_bytes().count(b"\n") if job.partial.exists() else 0


def test_a_run_killed_at_any_moment_ends_with_the_same_output(job):
    job.rows(ROWS)
    expected = expected_output(job)
    rng = random.Random(os.environ.get("JFP8KV_CRASH_SEED", "7"))
    killed = kept = 0
    for crash in range(CRASHES):
        process = job.start("--step-s", STEP_S)
        match crash % 5:
            case 0:  # while it starts, recovers the journal and takes the lock
                time.sleep(rng.uniform(0, 0.5))
            case 4 if crash == CRASHES - 1:  # while the output is written
                wait_for(job.output.with_name("out.jsonl.new").exists, process)
            case _:
                target = kept + rng.randrange(1, 2 * len(ROWS) // CRASHES)
                wait_for(lambda target=target: lines(job) >= target, process)
        killed += kill(process)
        assert not job.output.exists() or job.output.read_bytes() == expected
        assert job.output.exists() or lines(job) >= kept, "a finished row was lost"
        kept = lines(job)
    assert killed >= CRASHES // 2  # on a slow machine some runs end first
    assert ended(job.start()) == (0, "")
    assert job.output.read_bytes() == expected
    assert sorted(path.name for path in job.folder.iterdir()) == [
        "out.jsonl",
        "out.jsonl.run.json",
        "rows.jsonl",
        "run.yaml",
    ]


def test_an_output_is_never_seen_in_part(job):
    job.rows(ROWS)
    expected = expected_output(job)
    for _ in range(3):
        process = job.start()
        wait_for(job.output.with_name("out.jsonl.new").exists, process)
        kill(process)
        assert not job.output.exists() or job.output.read_bytes() == expected
    assert ended(job.start()) == (0, "")
    assert job.output.read_bytes() == expected


def test_a_second_process_is_refused_and_a_dead_one_has_no_lock(job):
    job.rows(ROWS)
    first = job.start("--step-s", 0.05)
    wait_for(lambda: lines(job) > 0, first)
    status, err = ended(job.start())
    assert status == 2 and f"process {first.pid} on" in err and "is writing this output" in err
    assert kill(first)
    assert ended(job.start()) == (0, "") and len(job.results()) == len(ROWS)


@pytest.mark.parametrize("room", [4_000, 30_000, 100_003])
def test_a_full_disk_loses_no_finished_row(job, room):
    job.rows(ROWS)
    expected = expected_output(job)
    status, err = ended(job.start("--file-bytes", room))
    assert status == 1 and "File too large" in err and "the same command resumes" in err
    kept = job.partial.read_bytes()
    assert room - 500 < len(kept) <= room and (kept.endswith(b"}}\n") or not kept)
    assert ended(job.start()) == (0, "") and job.output.read_bytes() == expected


def test_memory_does_not_grow_with_the_number_of_rows(job):
    rows = 200_000
    peak = {}
    for count in (2_000, rows):
        job.write(out=f"out-{count}.jsonl", rows=f"rows-{count}.jsonl")
        with (job.folder / f"rows-{count}.jsonl").open("w") as file:
            file.writelines(f'{{"word": "word number {i}", "id": {i}}}\n' for i in range(count))
        done = job.start()
        out, err = done.communicate(timeout=300)
        assert done.returncode == 0, err
        peak[count] = int(out) * (1 if os.uname().sysname == "Darwin" else 1024)
    assert peak[rows] < peak[2_000] + 16 * 2**20, "16 MiB is 80 bytes for each row"
    with job.output.open() as file:
        assert sum(1 for _ in file) == rows
