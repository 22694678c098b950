"""Decode and prefill attention, timed: FP8 pages against bf16 pages, scales by tensor against scales by token and head."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax

from benchmarks._gpu.problems import NONE, TENSOR, TOKEN_HEAD, Attention, Shape
from benchmarks._gpu.session import Row, Session
from benchmarks._gpu.timing import compiled


def problems(session: Session, config: dict[str, Any], part: str) -> Iterator[Attention]:
    """Every shape, element and kind of scales, with the blocks that tuning found in this run."""
    for shape in Shape.all(config, part):
        for element in config["elements"]:
            for scales in (TENSOR, TOKEN_HEAD) if element != "bf16" else (NONE,):
                one = Attention(
                    shape, element, scales, part == "prefill", config["rotation"], session.dry_run
                )
                yield replace(one, blocks=session.blocks.get((one.kernel, one.block_class)))


def decode(session: Session, config: dict[str, Any]) -> None:
    run(session, config, problems(session, config, "decode"))


def prefill(session: Session, config: dict[str, Any]) -> None:
    run(session, config, problems(session, config, "prefill"))


def run(session: Session, config: dict[str, Any], todo: Iterable[Attention]) -> None:
    """A row for each; programs are compiled several at once, a little ahead."""
    todo, size = list(todo), config["compilers"]
    for some in (todo[i : i + size] for i in range(0, len(todo), size)):
        programs = compile_all(session, some, size) if session.left() > 0 else {}
        for one in session.each(some, lambda a: f"{a.shape.name}, {a.element}, {a.scales}"):
            if session.may_time(one.kernel, one.element, one.kernel, shape=one.shape.name):
                with session.guarded(one.kernel, **labels(one)):
                    time_one(session, one, programs.get(one))


def compile_all(session: Session, some: Iterable[Attention], workers: int) -> Any:
    """Programs by what they compute."""

    def lowered(one: Attention) -> Any:
        return session.clock.lower(one.work, jax.eval_shape(one.carry), jax.eval_shape(one.rest))

    return compiled(((one, lambda one=one: lowered(one)) for one in some), workers=workers)


def labels(one: Attention) -> dict[str, str]:
    return {"shape": one.shape.name, "element": one.element, "scales": one.scales}


def time_one(session: Session, one: Attention, program: Any) -> Row:
    if isinstance(program, Exception):
        raise program
    taken = session.clock.time(one.work, program, *one.arrays())
    figures = taken.row
    if one.prefill:
        figures["tflops"] = one.shape.prefill_flop() / taken.median / 1e12
    else:
        rate = one.shape.cache_bytes(one.element, one.scales) / taken.median
        figures |= {"gb_s": rate / 1e9, "share_of_copy": rate / session.facts["copy_bytes_s"]}
    return session.row(
        one.kernel, **labels(one), **figures, blocks=None if one.blocks is None else str(one.blocks)
    )
