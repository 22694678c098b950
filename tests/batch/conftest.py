"""Runs without a model, in this process and as programs of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jfp8kv.batch.check import load
from jfp8kv.batch.run import Outcome, run
from tests.batch.stub import Stub

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("stub.py")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Job:
    """A config in a folder of its own, over the stub."""

    def __init__(self, folder: Path):
        self.folder, self.config, self.output = folder, folder / "run.yaml", folder / "out.jsonl"
        self.partial, self.record = (
            folder / f"out.jsonl.{what}" for what in ("partial", "run.json")
        )
        self.write()

    def write(
        self,
        text: str = 'prompt: "Say {{ word }}"',
        *,
        rows: str = "rows.jsonl",
        out: str = "out.jsonl",
    ) -> None:
        self.output = self.folder / out
        self.config.write_text(
            f"model: stub\ninput: {self.folder / rows}\noutput: {self.output}\n{text}\n"
        )

    def rows(self, rows: Iterable[Any]) -> None:
        write_rows(self.folder / "rows.jsonl", rows)

    def run(self, *overrides: str, stub: Stub | None = None, **options: Any) -> Outcome:
        """Here, with these overrides."""
        return run(load(self.config, overrides), open_engine=lambda *_: stub or Stub(), **options)

    def start(self, *options: object) -> subprocess.Popen[str]:
        """As a program."""
        command = [sys.executable, str(STUB), str(self.config), *map(str, options)]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        }
        return subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def results(self) -> list[Any]:
        return read_rows(self.output)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)
