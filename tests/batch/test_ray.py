"""Runs on two workers of a local Ray cluster: the output is that of one process.

Ray is not among the test dependencies: `pip install 'jfp8kv[ray]'` enables these tests.
"""

import os
import signal

import pytest

from jfp8kv.batch.ray_runner import _ranges
from tests.batch.test_crash import ended, expected_output, kill, lines, wait_for

ROWS = [{"word": f"w{i}", "id": i} if i % 70 else {"wrd": i} for i in range(600)]
PATIENCE_S = 120
RAY = "runner: ray\nray: {workers: 2, rows_per_block: 40}\n"


def test_row_numbers_are_grouped_into_ranges():
    assert _ranges([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)] and _ranges([]) == []


@pytest.fixture
def started(job):
    """Configure a job on Ray; return the expected output and the folder of worker process ids."""
    pytest.importorskip("ray")
    job.rows(ROWS)
    expected = expected_output(job)
    job.write('prompt: "Say {{ word }}"\n' + RAY)
    pids = job.folder / "pids"
    pids.mkdir()
    return expected, pids


def test_a_worker_that_dies_is_replaced_and_its_rows_run_again(job, started):
    expected, pids = started
    process = job.start("--step-s", 0.1, "--pids", pids)
    wait_for(lambda: lines(job) > 40, process, PATIENCE_S)
    first = {int(path.name) for path in pids.iterdir()}
    assert len(first) == 2, "two workers"
    os.kill(min(first), signal.SIGKILL)
    status, err = ended(process, PATIENCE_S)
    assert status == 1, err
    assert job.output.read_bytes() == expected
    assert len(list(pids.iterdir())) == 3, "one was replaced"


def test_a_run_resumes_with_another_runner(job, started):
    expected, pids = started
    process = job.start("--step-s", 0.1, "--pids", pids)
    wait_for(lambda: lines(job) > 40, process, PATIENCE_S)
    assert kill(process)
    kept = lines(job)
    job.write()
    local = job.start("--step-s", 0.05)
    wait_for(lambda: lines(job) > kept + 100, local)
    assert kill(local)
    job.write('prompt: "Say {{ word }}"\n' + RAY)
    status, err = ended(job.start(), PATIENCE_S)
    assert status == 1, err
    assert job.output.read_bytes() == expected
