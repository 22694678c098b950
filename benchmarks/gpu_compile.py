"""Every GPU kernel, compiled for an H100 and an A100 that are not there, and held to what its machine code must be; and the
engine's steps with the kernels in them, held to leaving the pool where it is.

    make gpu-compile

prints both and writes them to `docs/gpu-kernels.md`, where its columns and the guards are explained. Exits with 1 when a guard
fails. Nothing is run, so nothing is timed: the bounds are counted.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from benchmarks._common import console
from benchmarks._gpu.cases import cases
from benchmarks._gpu.compiled import Report, compile_case
from benchmarks._gpu.steps import StepReport, compile_step, step_cases
from benchmarks._gpu.topology import Target, without_a_gpu

DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu-kernels.md"
BEGIN, END = "<!-- `make gpu-compile` writes from here -->", "<!-- to here -->"
COLUMNS = [
    "kernel",
    "GPU",
    "registers",
    "spilled",
    "shared",
    "warps",
    "blocks",
    "tensor",
    "static bound",
    "by",
]
WIDTHS = (44, 4, 9, 7, 7, 5, 6, 6, 12, 17)


def row(report: Report) -> list[str]:
    return [
        report.case.name,
        report.case.target.name.upper(),
        str(report.registers),
        str(report.spilled_bytes),
        str(report.shared_bytes),
        str(report.warps),
        str(report.blocks),
        ", ".join(report.tensor_ops) or "-",
        f"{100 * report.bound.share:.0f}% of {report.bound.of}" if report.bound else "-",
        report.bound.limit if report.bound else "-",
    ]


def sentence(report: StepReport) -> str:
    """What is said of a step."""
    return (
        f"{report.case.name}, {report.case.target.name.upper()}: runs {' and '.join(report.kernels)}; "
        f"updates {report.aliased_bytes / 2**30:.2f} of {report.pool_bytes / 2**30:.2f} GiB of cache in place; needs "
        f"{report.temporary_bytes / 2**20:.0f} MiB besides, whatever the cache"
    )


def show(cells: list[str]) -> None:
    """One line; the first two columns and the last one are text, the others are set to the right."""
    sides = ("<", "<", *">" * 7, "<")
    line = "  ".join(
        f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, WIDTHS, strict=True)
    )
    console.print(line, highlight=False, soft_wrap=True)


def versions() -> str:
    """What the table depends on."""
    found = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def document(reports: Sequence[Report | StepReport], text: str) -> str:
    """The document with its generated part replaced."""
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    kernels = [report for report in reports if isinstance(report, Report)]
    lines = [COLUMNS, ["---", "---", *["---:"] * 7, "---"], *(row(report) for report in kernels)]
    made = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    made += "\n\n" + "\n".join(
        f"- {sentence(report)}." for report in reports if isinstance(report, StepReport)
    )
    return f"{before}{BEGIN}\n\n{made}\n\nCompiled with {versions()}.\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--check", action="store_true", help="leave docs/gpu-kernels.md as it is"
    )
    arguments.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="kernels with TEXT in name or GPU; repeatable",
    )
    arguments.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave the PTX and SASS of every kernel here"
    )
    given = arguments.parse_args(argv)
    without_a_gpu()

    began, reports = time.perf_counter(), []
    console.print("Compiled, not run: no figure here is a measurement.")
    show(COLUMNS)
    chosen = [
        case
        for case in cases()
        if all(text in f"{case.name} {case.target.name}" for text in given.only)
    ]
    # The compilers run outside Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for report in pool.map(lambda case: compile_case(case, given.keep), chosen):
            reports.append(report)
            show(row(report))
            for fault in report.faults:
                console.print(f"  [red]fails[/]: {fault}", highlight=False)
    # One after another: a step is traced as if the default backend were a GPU, which all threads would see.
    steps = [
        case
        for case in step_cases(Target.h100())
        if all(text in f"{case.name} h100" for text in given.only)
    ]
    for report in map(compile_step, steps):
        reports.append(report)
        console.print(sentence(report), highlight=False, soft_wrap=True)
        for fault in report.faults:
            console.print(f"  [red]fails[/]: {fault}", highlight=False)
    failed = sum(bool(report.faults) for report in reports)
    console.print(
        f"{len(reports)} kernels and steps in {time.perf_counter() - began:.0f} s; {failed} fail a guard. {versions()}",
        soft_wrap=True,
    )
    if not given.check and not given.only and not failed:
        DOCUMENT.write_text(
            document(reports, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
