"""Compiled steps of one engine, and the report of what was compiled.

Compilation is explicit (`lower`, `compile`) instead of left to a jit cache: a call with new shapes
is a new entry here and a line in the log, not a silent pause.

A program is compiled for a model and a set of shapes, so engines of equal models share it through a
`ProgramCache`. The cache is small because a program takes about two hundred memory maps on a CPU,
and Linux allows a process 65,530.
"""

import dataclasses
import functools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from rich import box
from rich.console import Group
from rich.text import Text

from jfp8kv.cache.pool import KVPool
from jfp8kv.core.log import logger
from jfp8kv.core.report import Report, empty_table
from jfp8kv.engine.step import StepModel, Weights

_MIB = 2**20

# XLA options of all programs, by name. For tests and experiments; None leaves XLA's defaults.
compiler_options: dict[str, bool | int | str] | None = None

Output = TypeVar("Output")
Key = tuple[Hashable, ...]
# (model, weights, scales, batch, pages, **static) -> (output, pages)
Step = Callable[..., tuple[Output, KVPool]]


@runtime_checkable
class StepInputs(Protocol):
    """The arrays of a step beside the weights and the pool, such as a `ForwardBatch`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Requests and tokens, both padded."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
      step: the name of the step function.
      requests: the padded number of requests.
      tokens: the padded number of tokens of each request.
      variant: the sampler, see `SamplerVariant.name`.
      seconds: compile time.
      run: (weights, scales, batch, pages) -> (output, pages). The pages are donated.
    """

    step: str
    requests: int
    tokens: int
    variant: str
    seconds: float
    run: jax.stages.Compiled

    @property
    def memory(self) -> Any:
        """XLA's memory analysis: `temp_size_in_bytes`, `alias_size_in_bytes`, ..."""
        return self.run.memory_analysis()

    def describe(self, *, shared: bool) -> "CompiledStep":
        """Return the program's row of a report."""
        memory = self.memory
        return CompiledStep(
            step=self.step,
            requests=self.requests,
            tokens=self.tokens,
            variant=self.variant,
            seconds=self.seconds,
            temporary_bytes=getattr(memory, "temp_size_in_bytes", 0),
            code_bytes=getattr(memory, "generated_code_size_in_bytes", 0),
            shared=shared,
        )


class ProgramCache:
    """An LRU cache of at most `size` programs, shared by all engines. Thread-safe."""

    def __init__(self, size: int = 64):
        self._size = size
        self._lock = threading.Lock()
        self._programs: OrderedDict[Key, Program] = OrderedDict()

    def get(self, key: Key) -> Program | None:
        """Return the program of `key` and mark it as used; None if it is not cached."""
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
            return program

    def put(self, key: Key, program: Program) -> None:
        """Add a program, and drop the least recently used beyond `size`."""
        with self._lock:
            self._programs[key] = program
            self._programs.move_to_end(key)
            while len(self._programs) > self._size:
                self._programs.popitem(last=False)


_SHARED = ProgramCache()


class Programs:
    """The compiled steps of one engine, compiled when they are first needed.

    Args:
      model: the static argument of all steps.
      weights: the model's weights on the device.
      scales: static scales of the cache, or None.
      cache: where engines share programs.
    """

    def __init__(
        self,
        model: StepModel,
        weights: Weights,
        scales: Any,
        *,
        cache: ProgramCache = _SHARED,
    ):
        self.model = model
        self.weights = weights
        self.scales = scales
        self._cache = cache
        self._own: dict[Key, Program] = {}
        self._compiled: list[Program] = []
        self._warm = False
        self._model_key = (model, _signature(weights))

    @property
    def compiled(self) -> tuple[Program, ...]:
        """The programs that this engine compiled itself, in order."""
        return tuple(self._compiled)

    def mark_warm(self) -> None:
        """Log later compilations as warnings, because a request waits for each."""
        self._warm = True

    def call(
        self,
        step: Step[Output],
        batch: StepInputs,
        pages: KVPool,
        *,
        scales: Any = None,
        variant: str = "",
        **static: Hashable,
    ) -> tuple[Output, KVPool]:
        """Return `step(model, weights, scales, batch, pages, **static)`, compiled.

        `pages` is donated.

        Args:
          scales: used instead of the engine's scales; any pytree that `step` takes in their place.
          variant: the name of the sampler in the report.
        """
        scales = self.scales if scales is None else scales
        program = self.program(step, batch, pages, scales=scales, variant=variant, **static)
        result: tuple[Output, KVPool] = program.run(self.weights, scales, batch, pages)
        return result

    def compute(
        self,
        function: Callable[..., Output],
        values: jax.Array,
        batch: StepInputs,
        *,
        variant: str = "",
        **static: Hashable,
    ) -> Output:
        """Return `function(values, batch, **static)`, compiled. The pool is not involved."""
        key = (function, *static.items(), _signature((values, batch)))
        jitted = jax.jit(functools.partial(function, **static))
        program = self._find(key, function.__name__, batch, variant, jitted, (values, batch))
        output: Output = program.run(values, batch)
        return output

    def program(
        self,
        step: Step[Any],
        batch: StepInputs,
        pages: KVPool,
        *,
        scales: Any = None,
        variant: str = "",
        **static: Hashable,
    ) -> Program:
        """Return the program of a step on arrays of these shapes. Abstract arrays suffice."""
        scales = self.scales if scales is None else scales
        key = (step, *static.items(), self._model_key, _signature((scales, batch, pages)))
        jitted = jax.jit(functools.partial(step, self.model, **static), donate_argnums=3)
        arguments = (self.weights, scales, batch, pages)
        return self._find(key, step.__name__, batch, variant, jitted, arguments)

    def report(self) -> "CompileReport":
        """Return a report on the programs that this engine compiled or took from the cache."""
        compiled = set(map(id, self._compiled))
        return CompileReport(
            tuple(
                program.describe(shared=id(program) not in compiled)
                for program in self._own.values()
            )
        )

    def _find(
        self,
        key: Key,
        name: str,
        batch: StepInputs,
        variant: str,
        jitted: Any,
        arguments: tuple[Any, ...],
    ) -> Program:
        """Return the program of `key` from this engine or the cache, or compile it."""
        program = self._own.get(key)
        if program is not None:
            return program
        program = self._cache.get(key)
        if program is None:
            program = self._compile(name, batch, variant, jitted, arguments)
        self._own[key] = program
        self._cache.put(key, program)
        return program

    def _compile(
        self, name: str, batch: StepInputs, variant: str, jitted: Any, arguments: tuple[Any, ...]
    ) -> Program:
        started = time.perf_counter()
        run = jitted.lower(*arguments).compile(compiler_options=compiler_options)
        seconds = time.perf_counter() - started
        requests, tokens = batch.shape
        program = Program(name, requests, tokens, variant, seconds, run)
        self._compiled.append(program)
        logger.log(
            logging.WARNING if self._warm else logging.INFO,
            "compiled step %s%s for %d x %d tokens in %.1f s%s",
            name,
            f" ({variant})" if variant else "",
            requests,
            tokens,
            seconds,
            " while serving, after warm-up" if self._warm else "",
        )
        return program


def _signature(tree: Any) -> Key:
    """Return the structure, shapes and dtypes of a pytree."""
    leaves, structure = jax.tree.flatten(tree)
    return (structure, *((x.shape, x.dtype) for x in leaves))


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """One compiled program.

    Attributes:
      step: the name of the step.
      requests: the padded number of requests.
      tokens: the padded number of tokens of each request.
      variant: the sampler of a decode, "plain" or "full" (sampling/state.py).
      seconds: compile time, also if another engine compiled it.
      temporary_bytes: the memory it needs besides its arguments and outputs.
      code_bytes: size of its machine code, 0 where the platform does not report it.
      shared: whether another engine compiled it.
    """

    step: str
    requests: int
    tokens: int
    variant: str
    seconds: float
    temporary_bytes: int
    code_bytes: int
    shared: bool


@dataclasses.dataclass(frozen=True, repr=False)
class CompileReport(Report):
    """The programs of an engine, in the order of their first use. Prints as a table."""

    steps: tuple[CompiledStep, ...]

    @property
    def seconds(self) -> float:
        """Seconds that this engine spent compiling, or reading from the compilation cache."""
        return math.fsum(step.seconds for step in self.steps if not step.shared)

    def __repr__(self) -> str:
        return f"CompileReport({len(self.steps)} programs, {self.seconds:.1f} s)"

    def _layout(self, lines: box.Box | None) -> Group:
        columns = (
            "step",
            "requests x tokens",
            "variant",
            "seconds",
            "temporaries MiB",
            "code KiB",
            "",
        )
        table = empty_table(lines, *columns, text=["variant", ""])
        for step in self.steps:
            table.add_row(
                step.step,
                f"{step.requests} x {step.tokens}",
                step.variant,
                f"{step.seconds:.2f}",
                f"{step.temporary_bytes / _MIB:.2f}",
                f"{step.code_bytes / 1024:.0f}",
                "from another engine" if step.shared else "",
            )
        compiled = sum(not step.shared for step in self.steps)
        return Group(
            Text(f"{len(self.steps)} programs, {compiled} compiled here in {self.seconds:.1f} s"),
            table,
        )
