"""Batch runs without a model, in this process and as programs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jfp8kv.batch import RunResult, load_config, run_batch
from tests.batch.stub import StubEngine

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("stub.py")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Job:
    """A config in its folder, run on the stub engine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "run.yaml"
        self.output = folder / "out.jsonl"
        self.partial = folder / "out.jsonl.partial"
        self.manifest = folder / "out.jsonl.run.json"
        self.write()

    def write(
        self,
        text: str = 'prompt: "Say {{ word }}"',
        *,
        rows: str = "rows.jsonl",
        out: str = "out.jsonl",
    ) -> None:
        """Write the config."""
        self.output = self.folder / out
        self.config.write_text(
            f"model: stub\ninput: {self.folder / rows}\noutput: {self.output}\n{text}\n"
        )

    def rows(self, rows: Iterable[Any]) -> None:
        """Write the input."""
        write_rows(self.folder / "rows.jsonl", rows)

    def run(self, *overrides: str, stub: StubEngine | None = None, **options: Any) -> RunResult:
        """Run in this process."""
        engine = stub or StubEngine()
        config = load_config(self.config, overrides)
        return run_batch(config, open_engine=lambda *_: engine, **options)

    def start(self, *options: object) -> subprocess.Popen[str]:
        """Run as a program."""
        command = [sys.executable, str(STUB), str(self.config), *map(str, options)]
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def results(self) -> list[Any]:
        """Return the output rows."""
        return read_rows(self.output)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)
