"""Compiled step programs: built once for each set of shapes, counted, and shared by engines with an equal model.

An engine keeps its own programs; the last few that any engine used are kept for the next one. No more, since each holds about
two hundred memory maps on a CPU, and Linux allows a process 65,530.

Compilation is explicit (`lower`, `compile`), not left to a jit cache: what is compiled is known, and a call with other shapes
is a new entry here rather than a silent pause.
"""

import dataclasses
import functools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

from jfp8kv.cache.pool import KVPool
from jfp8kv.engine.batch import DecodeBatch, ForwardBatch
from jfp8kv.engine.compile_report import CompiledStep, CompileReport
from jfp8kv.engine.copies import Copies
from jfp8kv.engine.step import StepModel, Weights

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step and what compiling it took."""

    name: str
    requests: int
    tokens: int
    variant: str
    seconds: float
    run: Any  # jax.stages.Compiled; of a step: (weights, scales, batch, pages) -> (output, pages), the pages donated

    @property
    def memory(self) -> Any:
        """XLA's account of the program: `temp_size_in_bytes`, `alias_size_in_bytes`, ..."""
        return self.run.memory_analysis()

    def described(self, *, shared: bool) -> CompiledStep:
        """Its line of a report."""
        sizes = (
            getattr(self.memory, f"{part}_size_in_bytes", 0) for part in ("temp", "generated_code")
        )
        return CompiledStep(
            self.name, self.requests, self.tokens, self.variant, self.seconds, *sizes, shared
        )


KEPT = 64  # programs kept for engines to come

_recent: OrderedDict[Key, Program] = OrderedDict()


class Programs:
    """The programs of one engine: calls them by name, building those that nobody built before.

    `scales` are an argument of every call and may be others at the next, of the same shapes: static scales, None, or whatever
    tree a step of somebody else's takes in their place.
    """

    def __init__(self, model: StepModel, weights: Weights, scales: Any):
        self.model, self.weights, self.scales = model, weights, scales
        self.built: list[Program] = []  # by this engine, in order
        self._own: dict[Key, Program] = {}
        self._fixed = (model, _signature((weights, scales)))

    def call(
        self,
        step: Callable,
        batch: ForwardBatch | DecodeBatch | Copies,
        pages: KVPool,
        *,
        variant: str = "",
        **static: Any,
    ) -> tuple[Any, KVPool]:
        """`step(model, weights, scales, batch, pages, **static)`, compiled; `pages` is donated."""
        program = self.program(step, batch, pages, variant=variant, **static)
        return program.run(self.weights, self.scales, batch, pages)

    def compute(
        self,
        function: Callable,
        values: Any,
        batch: DecodeBatch,
        *,
        variant: str = "",
        **static: Any,
    ) -> Any:
        """`function(values, batch, **static)`, compiled: what goes on outside the pool."""
        key = (function, *static.items(), _signature((values, batch)))
        program = self._found(
            key, lambda: _build(function, (), (values, batch), batch, variant, static)
        )
        return program.run(values, batch)

    def program(
        self,
        step: Callable,
        batch: ForwardBatch | DecodeBatch | Copies,
        pages: KVPool,
        *,
        variant: str = "",
        **static: Any,
    ) -> Program:
        """The compiled program for a step on arrays shaped like these (shapes suffice). `variant` names it in the report."""
        key = (step, *static.items(), self._fixed, _signature((batch, pages)))
        arguments = (self.weights, self.scales, batch, pages)
        return self._found(
            key, lambda: _build(step, (self.model,), arguments, batch, variant, static, donated=3)
        )

    def _found(self, key: Key, build: Callable[[], Program]) -> Program:
        if key not in self._own:
            program = _recent.pop(
                key, None
            )  # and put back as the latest; engines of other threads do the same
            if program is None:
                self.built.append(program := build())
            self._own[key] = _recent[key] = program
            while len(_recent) > KEPT:
                _recent.popitem(last=False)
        return self._own[key]

    def report(self) -> CompileReport:
        """What was compiled for this engine, or found ready."""
        built = set(map(id, self.built))
        return CompileReport(
            tuple(p.described(shared=id(p) not in built) for p in self._own.values())
        )


def _build(
    function: Callable,
    fixed: tuple,
    arguments: tuple,
    batch: ForwardBatch | DecodeBatch | Copies,
    variant: str,
    static: dict[str, Any],
    *,
    donated: int | tuple[int, ...] = (),
) -> Program:
    """`function(*fixed, *arguments, **static)`, compiled for arguments shaped like these."""
    began = time.perf_counter()
    jitted = jax.jit(functools.partial(function, *fixed, **static), donate_argnums=donated)
    compiled = jitted.lower(*arguments).compile()
    requests, tokens = batch.shape
    return Program(
        function.__name__, requests, tokens, variant, time.perf_counter() - began, compiled
    )


def _signature(tree: Any) -> Key:
    leaves, structure = jax.tree.flatten(tree)
    return (structure, *((x.shape, x.dtype) for x in leaves))
