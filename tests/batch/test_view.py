"""What a run shows: a table on a terminal, lines elsewhere, nothing when it is to be quiet."""

import os
import pty
import subprocess
import sys
import time

from jfp8kv.batch.view import Progress, View
from tests.batch.conftest import ROOT, STUB

COUNTERS = {
    "kv_bytes_capacity": 1000, "kv_bytes_used": 250, "prefix_hit_tokens": 1234, "preemptions": 2,
}  # fmt: skip


def progress(**changes) -> Progress:
    usual = {"done": 1500, "failed": 0, "share": 0.5, "share_before": 0.25, "seconds": 10.0}
    tokens = {"prompt_tokens": 50_000, "completion_tokens": 2_000}
    return Progress(**usual | tokens | {"counters": COUNTERS} | changes)


def test_figures_are_said_in_words():
    assert progress().figures() == {
        "rows": "1,500 done (50%)", "tokens/s": "5,000 in, 200 out", "cache": "25% used", "prefix hits": "1,234 tokens",
        "preemptions": "2", "time": "0:10, 0:20 left",
    }  # fmt: skip
    assert progress(failed=3).figures()["rows"] == "1,500 done (50%), 3 failed"
    assert progress(share=0.25).figures()["time"] == "0:10, ? left"
    assert progress(counters={}).figures().keys() == {"rows", "tokens/s", "time"}
    assert progress(seconds=7322, share=1.0).figures()["time"] == "2:02:02, 0:00 left"


def test_lines_are_said_where_there_is_no_terminal(capsys):
    with View(line_s=0.01).watching(progress):
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines and set(lines) == {
        "jfp8kv: " + "; ".join(f"{name} {value}" for name, value in progress().figures().items())
    }


def test_nothing_is_said_when_quiet(capsys):
    view = View(quiet=True, line_s=0.001)
    with view.watching(progress):
        time.sleep(0.05)
    view.say("hello")
    assert capsys.readouterr().err == ""


def test_a_table_is_drawn_on_a_terminal(job):
    job.rows([{"word": str(i)} for i in range(400)])
    main, other = pty.openpty()
    try:
        command = [sys.executable, str(STUB), str(job.config), "--step-s", "0.03", "--view"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=other,
            stdout=subprocess.PIPE,
        )
        drawn = os.read(main, 100_000).decode()
    finally:
        os.close(main), os.close(other)
    assert done.returncode == 0 and "rows" in drawn and "done (" in drawn and "left" in drawn
