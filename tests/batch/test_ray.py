"""Runs on the workers of a Ray cluster, started here with two of them: the output of one process, whatever becomes of a worker.

Ray is large and not among what the tests install: `pip install 'jfp8kv[ray]'` brings these into play.
"""

import os
import signal

import pytest

from jfp8kv.batch.on_ray import _ranges
from tests.batch.test_crash import ended, kill, lines, wait_for, whole_run

ROWS = [{"word": f"w{i}", "id": i} if i % 70 else {"wrd": i} for i in range(600)]
PATIENCE_S = 120
RAY = "runner: ray\nray: {workers: 2, rows_per_block: 40}\n"


def test_rows_that_are_left_are_ranges_of_their_numbers():
    assert _ranges([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)] and _ranges([]) == []


@pytest.fixture
def started(job):
    """A job on Ray, what it should make, and a folder with its workers' processes."""
    pytest.importorskip("ray")
    job.rows(ROWS)
    whole = whole_run(job)
    job.write('prompt: "Say {{ word }}"\n' + RAY)
    pids = job.folder / "pids"
    pids.mkdir()
    return whole, pids


def test_a_worker_that_dies_halfway_does_not_show(job, started):
    whole, pids = started
    process = job.start("--step-s", 0.1, "--pids", pids)
    wait_for(lambda: lines(job) > 40, process, PATIENCE_S)
    first = {int(path.name) for path in pids.iterdir()}
    assert len(first) == 2, "two workers"
    os.kill(min(first), signal.SIGKILL)
    status, err = ended(process, PATIENCE_S)
    assert status == 1, err
    assert job.output.read_bytes() == whole
    assert len(list(pids.iterdir())) == 3, "one was replaced"


def test_a_run_on_ray_that_is_killed_goes_on_in_one_process_and_the_other_way_round(job, started):
    whole, pids = started
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
    assert job.output.read_bytes() == whole
