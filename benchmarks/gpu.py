"""The GPU kernels on an NVIDIA GPU: checked, tuned, timed, and held against goals and others, in ten minutes.

    python -m benchmarks.gpu                 everything; results in benchmarks/results/DEVICE-DATE.json
    python -m benchmarks.gpu --tune          and the block sizes it found go where the kernels read them
    python -m benchmarks.gpu --adopt FILE    the block sizes of a results file go there, on any machine
    python -m benchmarks.gpu --dry-run       every part on a CPU, tiny and interpreted: proves that the script runs

Memory-bound figures are shares of what a copy reaches, measured first and in the same way. Every kernel is checked against
float64 on fresh random numbers before anything is timed; one that is wrong is not timed, and the exit status is 1. A part that
runs out of its share of the time says what it left out. Block sizes are tuned before the timing, which uses them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from benchmarks._common import console, header, table
from benchmarks._gpu import (
    attention,
    checks,
    device,
    end_to_end,
    engine,
    matmuls,
    mosaic,
    peers,
    tune,
    writes,
)
from benchmarks._gpu.goals import goals, show
from benchmarks._gpu.session import RESULTS, Session, results_path
from benchmarks._gpu.timing import Clock, cupti

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "bench" / "gpu_run.yaml"
PARTS: dict[str, Callable[[Session, dict[str, Any]], None]] = {
    "device": device.run,
    "check": checks.run,
    "engine": engine.run,
    "tune": tune.run,
    "decode": attention.decode,
    "write": writes.run,
    "prefill": attention.prefill,
    "product": matmuls.run,
    "peers": peers.run,
    "end_to_end": end_to_end.run,
    "mosaic": mosaic.run,
}
ALWAYS = ("device", "check")  # what the others rest on
ASKED_FOR = ("mosaic",)  # may hang
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "flax",
    "torch",
    "triton",
    "flashinfer-python",
    "fa3-fwd",
)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    if given.adopt:
        return adopt(given.adopt)
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # PyTorch's peers share the memory
    if given.dry_run:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_disable_most_optimizations", True)
    elif jax.default_backend() != "gpu":
        console.print(
            "No GPU here: `python -m benchmarks.gpu --dry-run` shows that the script runs."
        )
        return 2
    keep_compiled_programs()
    began = time.perf_counter()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))[
        "dry_run" if given.dry_run else "gpu"
    ]
    session = opened(given, config, began)
    header()
    say(f"timed by {session.clock.by} ({session.clock.why}); results go to {session.path}")
    try:
        run(session, config, [part for part in PARTS if part in ALWAYS or part in given.parts])
    finally:
        session.end_processes()
    if given.tune and not given.dry_run and session.facts.get("tuned"):
        say(f"block sizes: {', '.join(map(str, tune.publish(session.facts['tuned'])))}")
    say(f"{time.perf_counter() - began:.0f} s; {session.path}")
    return int(session.failed)


def run(session: Session, config: dict[str, Any], parts: Sequence[str]) -> None:
    """The parts in turn; what is known is written after each."""
    for part in parts:
        session.begin(part, config["shares"][part])
        with session.guarded(part):
            PARTS[part](session, config)
        if part == "device" and "peers" in parts:
            peers.start(session, config)
        session.save()
    found = goals(session)
    session.facts["goals"] = [
        {"what": g.what.strip(), "wanted": g.wanted, "got": g.got, "met": g.met} for g in found
    ]
    session.save()
    show(found, table, dry_run=session.dry_run)


def adopt(path: Path) -> int:
    """Take over the block sizes of a run elsewhere."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["dry_run"] or not facts.get("tuned"):
        say(f"{path} has no block sizes to take over: a dry run, or one that did not tune.")
        return 2
    say(f"block sizes: {', '.join(map(str, tune.publish(facts['tuned'])))}")
    return 0


def keep_compiled_programs() -> None:
    """In the checkout, unless somebody said where; as the library would, but without the packages it asks for the place."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="that all of it may take")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny shapes, interpreted on the CPU; measures nothing",
    )
    parser.add_argument(
        "--tune", action="store_true", help="write block sizes where the kernels read them, too"
    )
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FILE",
        help="write the block sizes of a results file there, and end",
    )
    parser.add_argument(
        "--clock", choices=["cupti", "loop"], help="how to time; by itself CUPTI where it works"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results; by itself benchmarks/results, and .cache for a dry run",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=[part for part in PARTS if part not in ASKED_FOR],
        help=f"{' and '.join(ALWAYS)} always run, {' and '.join(ASKED_FOR)} where named",
    )
    return parser


def opened(given: argparse.Namespace, config: dict[str, Any], began: float) -> Session:
    clock = Clock(
        **config["clock"], cupti=None if given.clock == "loop" or given.dry_run else cupti()
    )
    kind = jax.devices()[0].device_kind
    name = f"dry run {kind}" if given.dry_run else kind
    folder = given.out or (ROOT / ".cache" / "results" if given.dry_run else RESULTS)
    session = Session(results_path(folder, name), clock, given.dry_run, began + 60 * given.minutes)
    session.facts |= {
        "device": kind,
        "dry_run": given.dry_run,
        "versions": versions(),
        "commit": commit(),
        "clock": clock.by,
    }
    return session


def versions() -> dict[str, str]:
    """Of the packages there are."""
    there = {
        found.metadata["Name"].lower().replace("_", "-"): found.version
        for found in metadata.distributions()
    }
    return {"python": sys.version.split()[0]} | {
        name: there[name] for name in PACKAGES if name in there
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
