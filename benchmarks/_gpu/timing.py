"""Device time of one call.

Two clocks. *CUPTI* is what the driver says each kernel took, read through JAX's Mosaic profiler: nothing between kernels is in
it. *loop* is a compiled loop of calls, each waiting for the last, by the wall, less what a loop of nothing takes: launches are
in it. The second serves where the first is not allowed; for a kernel of a few microseconds it measures launches, since
Pallas-Triton calls are not captured in CUDA graphs (jax#27988). Every figure says which clock it is by.

Calls take turns among copies of their data that together exceed the L2 cache, so none finds its data there.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Step = Callable[[Any, Any, jax.Array], Any]


@dataclass(frozen=True)
class Work:
    """What is timed: `step(carry, rest, turn)` gives the next carry, of the same shapes, and uses copy `turn` of the data.

    `writes`: the carry holds pools that are updated in place; it is given up at every call.
    """

    step: Step
    turns: int = 1
    writes: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of all, the least and the most; the clock they are by, and how many kernels it saw."""

    median: float
    least: float
    most: float
    by: str
    kernels: int | None = None

    @property
    def row(self) -> dict[str, Any]:
        """As rows of the results have it."""
        times = {"us": self.median * 1e6, "least_us": self.least * 1e6, "most_us": self.most * 1e6}
        return times | {"by": self.by, "kernels": self.kernels}


class Clock:
    """Times calls by `cupti`, if there is one that works, else by loops.

    `cupti` starts and ends a recording: `_cupti_init()`, and `_cupti_get_timings(finalize)`, the name and milliseconds of every
    kernel since.
    """

    def __init__(self, *, calls: int, repeats: int, cupti: Any = None):
        self.calls, self.repeats, self._cupti = calls, repeats, cupti
        self._empty: float | None = None
        self.why = "asked for"
        if cupti is not None:
            try:
                self._recorded(jax.jit(_nothing), jnp.zeros(8, jnp.int32), None, 1)
            except Exception as error:
                self._cupti, self.why = None, f"CUPTI: {type(error).__name__}: {error}"

    @property
    def by(self) -> str:
        return "loop" if self._cupti is None else "cupti"

    def lower(self, work: Work, carry: Any, rest: Any) -> jax.stages.Lowered:
        """The program that `time` runs; shapes suffice."""
        if self._cupti is not None:
            turn = jax.ShapeDtypeStruct((), jnp.int32)
            return jax.jit(work.step, donate_argnums=0 if work.writes else ()).lower(
                carry, rest, turn
            )

        def loop(carry: Any, rest: Any) -> Any:
            return lax.fori_loop(
                0, self.calls, lambda i, now: work.step(now, rest, i % work.turns), carry
            )

        return jax.jit(loop, donate_argnums=0 if work.writes else ()).lower(carry, rest)

    def result(self, program: Any, carry: Any, rest: Any) -> Any:
        """What `program` gives, of the first turn or a whole loop: the same for everything that computes the same."""
        return program(carry, rest) if self._cupti is None else program(carry, rest, jnp.int32(0))

    def time(self, work: Work, program: Any, carry: Any, rest: Any) -> Timing:
        """Time `program`, compiled from what `lower` gave for this work."""
        kernels = None
        if self._cupti is not None:
            seconds, kernels = self._recorded(program, carry, rest, work.turns)
        else:
            seconds = [max(s - self._nothing(), 1e-9) for s in self._loops(program, carry, rest)]
        return Timing(statistics.median(seconds), min(seconds), max(seconds), self.by, kernels)

    def kernels(self, call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
        """How often each kernel runs in `call`, which waits for them, and its seconds in all, the longest first; nothing
        without CUPTI."""
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

    def _recorded(self, program: Any, carry: Any, rest: Any, turns: int) -> tuple[list[float], int]:
        """Seconds in kernels of each call, and how many kernels a call has."""
        numbers = [jnp.int32(turn) for turn in range(turns)]
        for number in numbers[:2]:
            carry = program(carry, rest, number)
        jax.block_until_ready(carry)
        calls = self.calls * self.repeats
        self._cupti._cupti_init()
        try:
            for call in range(calls):
                carry = program(carry, rest, numbers[call % turns])
            jax.block_until_ready(carry)
        finally:
            kernels = self._cupti._cupti_get_timings(True)
        each, left = divmod(len(kernels), calls)
        assert each and not left, f"{len(kernels)} kernels in {calls} calls"
        return [
            sum(ms for _, ms in kernels[i : i + each]) / 1e3 for i in range(0, len(kernels), each)
        ], each

    def _loops(self, program: Any, carry: Any, rest: Any) -> list[float]:
        """Seconds by the wall of each call, by the mean of a loop."""
        carry = jax.block_until_ready(program(carry, rest))
        seconds = []
        for _ in range(self.repeats):
            began = time.perf_counter()
            carry = jax.block_until_ready(program(carry, rest))
            seconds.append((time.perf_counter() - began) / self.calls)
        return seconds

    def _nothing(self) -> float:
        """Seconds of one turn of a loop that does next to nothing."""
        if self._empty is None:
            carry = jnp.zeros(8, jnp.int32)
            program = self.lower(Work(_nothing), carry, None).compile()
            self._empty = min(self._loops(program, carry, None))
        return self._empty


def _nothing(carry: jax.Array, rest: None, turn: jax.Array | int) -> jax.Array:
    return carry ^ (carry + turn)


def cupti() -> Any:
    """JAX's way to CUPTI, or None where this jaxlib has none."""
    try:
        from jax._src.lib import mosaic_gpu

        return (
            mosaic_gpu._mosaic_gpu_ext
            if hasattr(mosaic_gpu._mosaic_gpu_ext, "_cupti_init")
            else None
        )
    except (ImportError, AttributeError):
        return None


def compiled(
    jobs: Iterable[tuple[Any, Callable[[], jax.stages.Lowered]]], *, workers: int
) -> Mapping[Any, Any]:
    """Every job compiled, several at once: the program under the job's name, or what went wrong."""

    def made(lowered: Any) -> Any:
        try:
            return lowered.compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        waiting = {}
        for name, lower in jobs:
            try:
                waiting[name] = pool.submit(made, lower())
            except Exception as error:
                waiting[name] = pool.submit(lambda error=error: error)
        return {name: future.result() for name, future in waiting.items()}
