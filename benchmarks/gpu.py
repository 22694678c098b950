"""The GPU kernels on an NVIDIA GPU: checked, tuned, timed, and held against goals and others, in ten minutes.

    python -m benchmarks.gpu                 everything; results in benchmarks/results/DEVICE-DATE.json
    python -m benchmarks.gpu --tune          and the block sizes found go where the kernels read them
    python -m benchmarks.gpu --dry-run       every part on a CPU, tiny and interpreted: proves that the script runs

Memory-bound figures are shares of what a copy reaches, measured first and in the same way. Every kernel is checked against
float64 on fresh random numbers before anything is timed; one that is wrong is not timed, and the exit status is 1. A part that
runs out of its share of the time says what it left out. Block sizes are tuned before the timing, which uses them.
"""

import argparse
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
from benchmarks._gpu import attention, checks, device, end_to_end, peers, tune, writes
from benchmarks._gpu.goals import goals, shown
from benchmarks._gpu.session import RESULTS, Session, results_path
from benchmarks._gpu.timing import Clock, cupti

CONFIG = Path(__file__).parent.parent / "configs" / "bench" / "gpu_run.yaml"
PARTS: dict[str, Callable[..., None]] = {
    "check": checks.run,
    "tune": tune.run,
    "decode": attention.decode,
    "write": writes.run,
    "prefill": attention.prefill,
    "peers": peers.run,
    "end_to_end": end_to_end.run,
}
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "torch",
    "triton",
    "flashinfer-python",
    "fa3-fwd",
)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's peers have the same memory
    if given.dry_run:
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        console.print("No GPU here: `python -m benchmarks.gpu --dry-run` shows that the script runs.")
        return 2
    began = time.perf_counter()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["dry_run" if given.dry_run else "gpu"]
    session = opened(given, config, began)
    header()
    console.print(
        f"timed by {session.clock.by} ({session.clock.why}); results go to {session.path}", highlight=False, soft_wrap=True
    )

    session.begin("device", 1.0)
    device.target_config(session)
    with session.guarded("copy"):
        device.copy_bandwidth(session, config)
    session.save()
    if "copy_bytes_s" not in session.facts:
        return 1
    running = peers.start(config, given.dry_run) if "peers" in given.parts else {}
    try:
        for part in [name for name in PARTS if name == "check" or name in given.parts]:
            session.begin(part, config["shares"][part])
            with session.guarded(part):
                PARTS[part](session, config, *([running] if part == "peers" else []))
            session.save()
    finally:
        peers.stop(running)
    if "tuned" in session.facts and session.facts["tuned"]:
        written = tune.publish(session.facts["tuned"], None if given.tune else session.path.parent)
        console.print(f"block sizes: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    found = goals(session)
    session.facts["goals"] = [{"what": g.what.strip(), "wanted": g.wanted, "got": g.got, "met": g.met} for g in found]
    session.save()
    shown(found, table)
    console.print(f"{time.perf_counter() - began:.0f} s; {session.path}", highlight=False, soft_wrap=True)
    return int(session.failed)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="that all of it may take")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted on the CPU; measures nothing")
    parser.add_argument("--tune", action="store_true", help="write block sizes where the kernels read them, not to the results")
    parser.add_argument("--clock", choices=["cupti", "loop"], help="how to time; by itself CUPTI where it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="the check is always one")
    return parser


def opened(given: argparse.Namespace, config: dict[str, Any], began: float) -> Session:
    clock = Clock(**config["clock"], cupti=None if given.clock == "loop" or given.dry_run else cupti())
    kind = jax.devices()[0].device_kind
    name = f"dry run {kind}" if given.dry_run else kind
    session = Session(results_path(given.out, name), clock, given.dry_run, began + 60 * given.minutes)
    session.facts |= {"device": kind, "dry_run": given.dry_run, "versions": versions(), "commit": commit(), "clock": clock.by}
    return session


def versions() -> dict[str, str]:
    """Of the packages there are."""
    there = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in metadata.distributions()}
    return {"python": sys.version.split()[0]} | {name: there[name] for name in PACKAGES if name in there}


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
