"""Progress of a run: a table on a terminal, lines elsewhere, nothing when quiet."""

import os
import pty
import subprocess
import sys
import time

from jfp8kv.batch.progress import Progress, ProgressDisplay
from tests.batch.conftest import ROOT, STUB

COUNTERS = {
    "kv_bytes_capacity": 1000,
    "kv_bytes_used": 250,
    "prefix_hit_tokens": 1234,
    "preemptions": 2,
}


def progress(**changes) -> Progress:
    defaults = {
        "done": 1500,
        "failed": 0,
        "fraction": 0.5,
        "resumed_fraction": 0.25,
        "seconds": 10.0,
        "prompt_tokens": 50_000,
        "completion_tokens": 2_000,
        "counters": COUNTERS,
    }
    return Progress(**defaults | changes)


def test_progress_is_shown_in_words():
    assert progress().as_text() == {
        "rows": "1,500 done (50%)",
        "tokens/s": "5,000 prompt, 200 completion",
        "cache": "25% used",
        "prefix hits": "1,234 tokens",
        "preemptions": "2",
        "time": "0:10, 0:20 left",
    }
    assert progress(failed=3).as_text()["rows"] == "1,500 done (50%), 3 failed"
    assert progress(fraction=0.25).as_text()["time"] == "0:10, ? left"
    assert progress(counters={}).as_text().keys() == {"rows", "tokens/s", "time"}
    assert progress(seconds=7322, fraction=1.0).as_text()["time"] == "2:02:02, 0:00 left"


def test_lines_are_written_without_a_terminal(capsys):
    with ProgressDisplay(line_interval_s=0.01).following(progress):
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    text = "; ".join(f"{name} {value}" for name, value in progress().as_text().items())
    assert lines and set(lines) == {f"jfp8kv: {text}"}


def test_quiet_shows_nothing(capsys):
    display = ProgressDisplay(quiet=True, line_interval_s=0.001)
    with display.following(progress):
        time.sleep(0.05)
    display.message("hello")
    assert capsys.readouterr().err == ""


def test_a_table_is_drawn_on_a_terminal(job):
    job.rows([{"word": str(i)} for i in range(400)])
    main, other = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, str(STUB), str(job.config), "--step-s", "0.03", "--progress"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=other,
            stdout=subprocess.PIPE,
        )
        drawn = os.read(main, 100_000).decode()
    finally:
        os.close(main)
        os.close(other)
    assert done.returncode == 0
    assert all(text in drawn for text in ("rows", "done (", "left"))
