"""Check, tune and time the GPU kernels on an NVIDIA GPU, in ten minutes.

    python -m benchmarks.gpu                 everything; writes benchmarks/results/DEVICE-DATE.json
    python -m benchmarks.gpu --tune          also installs the tuned block sizes
    python -m benchmarks.gpu --adopt FILE    installs the block sizes of a results file
    python -m benchmarks.gpu --dry-run       every part on a CPU, with tiny shapes, interpreted

Memory-bound figures are fractions of the bandwidth of a copy, which is measured first. Every kernel
is compared with float64 on new random numbers before anything is timed. A wrong kernel is not
timed, and the exit status is 1. A part that exceeds its share of the time lists what it skipped.
Block sizes are tuned before the timing, which uses them.
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
    matmul,
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
    "matmul": matmul.run,
    "peers": peers.run,
    "end_to_end": end_to_end.run,
    "mosaic": mosaic.run,
}
ALWAYS = ("device", "check")  # prerequisites of the others
OPTIONAL = ("mosaic",)  # may hang
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
    """Run the benchmark and return the exit status."""
    given = arguments().parse_args(argv)
    if given.adopt:
        return adopt(given.adopt)
    # PyTorch's peers share the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.dry_run:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_disable_most_optimizations", True)
    elif jax.default_backend() != "gpu":
        console.print(
            "No GPU found: `python -m benchmarks.gpu --dry-run` tests the script on a CPU."
        )
        return 2
    enable_compilation_cache()
    began = time.perf_counter()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))[
        "dry_run" if given.dry_run else "gpu"
    ]
    session = open_session(given, config, began)
    header()
    clock = session.clock
    say(f"timed by {clock.name} ({clock.reason}); results: {session.path}")
    try:
        run(session, config, [part for part in PARTS if part in ALWAYS or part in given.parts])
    finally:
        session.end_processes()
    if given.tune and not given.dry_run and session.facts.get("tuned"):
        say(f"block sizes: {', '.join(map(str, tune.publish(session.facts['tuned'])))}")
    say(f"{time.perf_counter() - began:.0f} s; {session.path}")
    return int(session.failed)


def run(session: Session, config: dict[str, Any], parts: Sequence[str]) -> None:
    """Run the parts in order, and write the results after each."""
    for part in parts:
        session.begin(part, config["shares"][part])
        with session.guarded(part):
            PARTS[part](session, config)
        if part == "device" and "peers" in parts:
            peers.start(session, config)
        session.save()
    found = goals(session)
    session.facts["goals"] = [
        {
            "name": goal.name.strip(),
            "goal": goal.goal,
            "measured": goal.measured,
            "status": goal.status,
        }
        for goal in found
    ]
    session.save()
    show(found, table, dry_run=session.dry_run)


def adopt(path: Path) -> int:
    """Install the block sizes of a results file, and return the exit status."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["dry_run"] or not facts.get("tuned"):
        say(f"{path} has no tuned block sizes: it is a dry run, or did not tune.")
        return 2
    say(f"block sizes: {', '.join(map(str, tune.publish(facts['tuned'])))}")
    return 0


def enable_compilation_cache() -> None:
    """Cache compiled programs in the checkout, unless JAX is configured with another folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def say(text: str) -> None:
    """Print a line without formatting."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="time limit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny shapes, interpreted on a CPU; measures nothing",
    )
    parser.add_argument("--tune", action="store_true", help="also install the tuned block sizes")
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FILE",
        help="install the block sizes of a results file, and exit",
    )
    parser.add_argument("--clock", choices=["cupti", "loop"], help="by default CUPTI, if it works")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results; by default benchmarks/results, or .cache for a dry run",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=[part for part in PARTS if part not in OPTIONAL],
        help=f"{' and '.join(ALWAYS)} always run; {' and '.join(OPTIONAL)} only if named",
    )
    return parser


def open_session(given: argparse.Namespace, config: dict[str, Any], began: float) -> Session:
    """Return the session of a run."""
    bindings = None if given.clock == "loop" or given.dry_run else cupti()
    clock = Clock(**config["clock"], cupti=bindings)
    kind = jax.devices()[0].device_kind
    name = f"dry run {kind}" if given.dry_run else kind
    folder = given.out or (ROOT / ".cache" / "results" if given.dry_run else RESULTS)
    session = Session(results_path(folder, name), clock, given.dry_run, began + 60 * given.minutes)
    session.facts |= {
        "device": kind,
        "dry_run": given.dry_run,
        "versions": versions(),
        "commit": commit(),
        "clock": clock.name,
    }
    return session


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    installed = {
        found.metadata["Name"].lower().replace("_", "-"): found.version
        for found in metadata.distributions()
    }
    return {"python": sys.version.split()[0]} | {
        name: installed[name] for name in PACKAGES if name in installed
    }


def commit() -> str:
    """Return the commit of the checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
