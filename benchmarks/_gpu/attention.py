"""Time decode and prefill attention: FP8 and bfloat16 pages, tensor and token-head scales."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax

from benchmarks._gpu.problems import NONE, TENSOR, TOKEN_HEAD, Attention, Shape
from benchmarks._gpu.session import Row, Session
from benchmarks._gpu.timing import compile_jobs


def problems(session: Session, config: dict[str, Any], part: str) -> Iterator[Attention]:
    """Yield every shape, element type and kind of scales, with the blocks tuned in this run."""
    for shape in Shape.all(config, part):
        for element in config["elements"]:
            for scales in (TENSOR, TOKEN_HEAD) if element != "bf16" else (NONE,):
                problem = Attention(
                    shape, element, scales, part == "prefill", config["rotation"], session.dry_run
                )
                blocks = session.blocks.get((problem.kernel, problem.tuning_key))
                yield replace(problem, blocks=blocks)


def decode(session: Session, config: dict[str, Any]) -> None:
    """Time the decode problems."""
    run(session, config, problems(session, config, "decode"))


def prefill(session: Session, config: dict[str, Any]) -> None:
    """Time the prefill problems."""
    run(session, config, problems(session, config, "prefill"))


def run(session: Session, config: dict[str, Any], problems: Iterable[Attention]) -> None:
    """Add a row per problem. Programs are compiled concurrently, a few problems ahead."""
    remaining = list(problems)
    size = config["compilers"]
    for start in range(0, len(remaining), size):
        current = remaining[start : start + size]
        programs = compile_all(session, current, size) if session.left() > 0 else {}
        for problem in session.each(current, describe):
            kernel = problem.kernel
            if session.may_time(kernel, problem.element, kernel, shape=problem.shape.name):
                with session.guarded(kernel, **labels(problem)):
                    time_one(session, problem, programs.get(problem))


def compile_all(session: Session, problems: Iterable[Attention], workers: int) -> Any:
    """Return programs by problem."""

    def lower(problem: Attention) -> Any:
        carry, rest = jax.eval_shape(problem.carry), jax.eval_shape(problem.rest)
        return session.clock.lower(problem.work, carry, rest)

    jobs = ((problem, functools.partial(lower, problem)) for problem in problems)
    return compile_jobs(jobs, workers=workers)


def describe(problem: Attention) -> str:
    """Return a name for skipped problems."""
    return f"{problem.shape.name}, {problem.element}, {problem.scales}"


def labels(problem: Attention) -> dict[str, str]:
    """Return the columns that identify a problem in the results."""
    return {
        "shape": problem.shape.name,
        "element": problem.element,
        "scales": problem.scales,
    }


def time_one(session: Session, problem: Attention, program: Any) -> Row:
    """Time one problem and add its row."""
    if isinstance(program, Exception):
        raise program
    timing = session.clock.time(problem.work, program, *problem.arrays())
    figures = timing.row
    if problem.prefill:
        figures["tflops"] = problem.shape.prefill_flop() / timing.median / 1e12
    else:
        rate = problem.shape.cache_bytes(problem.element, problem.scales) / timing.median
        figures |= {"gb_s": rate / 1e9, "fraction_of_copy": rate / session.facts["copy_bytes_s"]}
    blocks = None if problem.blocks is None else str(problem.blocks)
    return session.row(problem.kernel, **labels(problem), **figures, blocks=blocks)
