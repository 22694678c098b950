"""Device time of one call, by one of two clocks.

- *cupti*: the sum of the kernels' durations as the driver reports them, read through JAX's Mosaic
  profiler. Time between kernels is excluded.
- *loop*: wall time of a compiled loop of dependent calls, minus that of an empty loop. It includes
  launches, and is used where CUPTI is not permitted. For a kernel of a few microseconds it measures
  launches, because Pallas-Triton calls are not captured in CUDA graphs (jax#27988).

Every result names its clock. Calls alternate between copies of their data that together exceed the
L2 cache, so none finds its data there.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Step = Callable[[Any, Any, jax.Array], Any]


@dataclass(frozen=True)
class Work:
    """The timed function.

    Attributes:
      step: `step(carry, rest, copy)` returns the next carry, of the same shapes, and uses copy
        number `copy` of the data.
      copies: number of copies of the data.
      writes: the carry has pools that are updated in place; it is donated in every call.
    """

    step: Step
    copies: int = 1
    writes: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, minimum and maximum; the clock, and the kernels per call."""

    median: float
    minimum: float
    maximum: float
    clock: str
    kernels: int | None = None

    @property
    def row(self) -> dict[str, Any]:
        """Figures of a row of the results."""
        return {
            "us": self.median * 1e6,
            "min_us": self.minimum * 1e6,
            "max_us": self.maximum * 1e6,
            "clock": self.clock,
            "kernels": self.kernels,
        }


class Clock:
    """Times calls with CUPTI if it works, otherwise with loops.

    `cupti` is a module with `_cupti_init()`, which starts a recording, and
    `_cupti_get_timings(finalize)`, which returns the name and milliseconds of every kernel since.
    """

    def __init__(self, *, calls: int, repeats: int, cupti: Any = None):
        self.calls, self.repeats, self._cupti = calls, repeats, cupti
        self._empty: float | None = None
        self.reason = "requested"
        if cupti is not None:
            try:
                self._recorded(jax.jit(_empty_step), jnp.zeros(8, jnp.int32), None, 1)
            except Exception as error:
                self._cupti = None
                self.reason = f"CUPTI: {type(error).__name__}: {error}"

    @property
    def name(self) -> str:
        """ "cupti" or "loop"."""
        return "loop" if self._cupti is None else "cupti"

    def lower(self, work: Work, carry: Any, rest: Any) -> jax.stages.Lowered:
        """Lower the program that `time` runs; shapes suffice."""
        if self._cupti is not None:
            copy = jax.ShapeDtypeStruct((), jnp.int32)
            donated = 0 if work.writes else ()
            return jax.jit(work.step, donate_argnums=donated).lower(carry, rest, copy)

        def loop(carry: Any, rest: Any) -> Any:
            def body(i: Any, carry: Any) -> Any:
                return work.step(carry, rest, i % work.copies)

            return lax.fori_loop(0, self.calls, body, carry)

        return jax.jit(loop, donate_argnums=0 if work.writes else ()).lower(carry, rest)

    def result(self, program: Any, carry: Any, rest: Any) -> Any:
        """Return the output of `program`, for comparison with other programs of the same work."""
        return program(carry, rest) if self._cupti is None else program(carry, rest, jnp.int32(0))

    def time(self, work: Work, program: Any, carry: Any, rest: Any) -> Timing:
        """Time `program`, compiled from the output of `lower` for this work."""
        kernels = None
        if self._cupti is not None:
            seconds, kernels = self._recorded(program, carry, rest, work.copies)
        else:
            overhead = self._empty_loop()
            seconds = [max(s - overhead, 1e-9) for s in self._loops(program, carry, rest)]
        return Timing(statistics.median(seconds), min(seconds), max(seconds), self.name, kernels)

    def kernels(self, call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
        """Return calls and total seconds of each kernel in `call`, the longest first.

        `call` must wait for its kernels. Empty without CUPTI.
        """
        if self._cupti is None:
            return {}
        self._cupti._cupti_init()
        try:
            call()
        finally:
            found = self._cupti._cupti_get_timings(True)
        seconds: dict[str, list[float]] = defaultdict(list)
        for name, ms in found:
            seconds[name].append(ms / 1e3)
        totals = {name: (len(each), sum(each)) for name, each in seconds.items()}
        return dict(sorted(totals.items(), key=lambda kernel: -kernel[1][1]))

    def _recorded(
        self, program: Any, carry: Any, rest: Any, copies: int
    ) -> tuple[list[float], int]:
        """Return the seconds in kernels of each call, and the number of kernels per call."""
        numbers = [jnp.int32(copy) for copy in range(copies)]
        for number in numbers[:2]:
            carry = program(carry, rest, number)
        jax.block_until_ready(carry)
        calls = self.calls * self.repeats
        self._cupti._cupti_init()
        try:
            for call in range(calls):
                carry = program(carry, rest, numbers[call % copies])
            jax.block_until_ready(carry)
        finally:
            kernels = self._cupti._cupti_get_timings(True)
        each, left = divmod(len(kernels), calls)
        assert each and not left, f"{len(kernels)} kernels in {calls} calls"
        starts = range(0, len(kernels), each)
        return [sum(ms for _, ms in kernels[i : i + each]) / 1e3 for i in starts], each

    def _loops(self, program: Any, carry: Any, rest: Any) -> list[float]:
        """Return the mean wall seconds per call of each loop."""
        carry = jax.block_until_ready(program(carry, rest))
        seconds = []
        for _ in range(self.repeats):
            began = time.perf_counter()
            carry = jax.block_until_ready(program(carry, rest))
            seconds.append((time.perf_counter() - began) / self.calls)
        return seconds

    def _empty_loop(self) -> float:
        """Return the seconds per iteration of a loop with almost no work."""
        if self._empty is None:
            carry = jnp.zeros(8, jnp.int32)
            program = self.lower(Work(_empty_step), carry, None).compile()
            self._empty = min(self._loops(program, carry, None))
        return self._empty


def _empty_step(carry: jax.Array, rest: None, copy: jax.Array | int) -> jax.Array:
    return carry ^ (carry + copy)


def cupti() -> Any:
    """Return JAX's CUPTI bindings, or None if this jaxlib has none."""
    try:
        from jax._src.lib import mosaic_gpu

        bindings = mosaic_gpu._mosaic_gpu_ext
    except (ImportError, AttributeError):
        return None
    return bindings if hasattr(bindings, "_cupti_init") else None


def compile_jobs(
    jobs: Iterable[tuple[Any, Callable[[], jax.stages.Lowered]]], *, workers: int
) -> Mapping[Any, Any]:
    """Compile jobs concurrently. Return the program, or the exception, of each job by its name."""

    def compile_one(lowered: Any) -> Any:
        try:
            return lowered.compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        results: dict[Any, Any] = {}
        for name, lower in jobs:
            try:
                results[name] = pool.submit(compile_one, lower())
            except Exception as error:
                results[name] = error
        return {n: x.result() if isinstance(x, Future) else x for n, x in results.items()}
