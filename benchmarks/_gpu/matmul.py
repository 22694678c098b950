"""Check and time `layer_matmul` against the matmul of XLA, which copies the matrix first."""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.problems import copies
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Timing, Work, compile_jobs
from jfp8kv.models.linear import stacked_matmul
from pallas_kernels import layer_matmul
from pallas_kernels.layer_matmul.reference import layer_matmul_reference

KERNEL, XLA = "layer_matmul", "XLA matmul"
BFLOAT16 = np.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Matmul:
    """A matmul of `rows` rows in bfloat16. Each call uses the matrix of the next layer."""

    matrix: str
    out: int
    width: int
    rows: int
    by_kernel: bool
    rotation: int
    interpret: bool

    @property
    def name(self) -> str:
        """Name of the implementation."""
        return KERNEL if self.by_kernel else XLA

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix."""
        return self.out * self.width * BFLOAT16.itemsize

    @property
    def layers(self) -> int:
        """Matrices in the stack."""
        return max(2, copies(self.matrix_bytes, self.rotation))

    @cached_property
    def work(self) -> Work:
        """The timed function."""
        return Work(self._step, copies=self.layers)

    def carry(self) -> jax.Array:
        """Return an output."""
        return jnp.zeros((self.rows, self.out), jnp.float32)

    def rest(self) -> tuple[jax.Array, jax.Array]:
        """Return rows and weights."""
        keys = jax.random.split(jax.random.key(5, impl="rbg"))
        x = jax.random.normal(keys[0], (self.rows, self.width), jnp.bfloat16)
        return x, jax.random.normal(keys[1], (self.layers, self.out, self.width), jnp.bfloat16)

    def _step(self, _: jax.Array, rest: tuple[jax.Array, jax.Array], layer: jax.Array) -> jax.Array:
        x, weights = rest
        if self.by_kernel:
            return layer_matmul(x, weights, layer, interpret=self.interpret)
        return stacked_matmul(x, weights, layer, weight_dtype=BFLOAT16, tiled=False)


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per matrix, number of rows and implementation; compile one matrix at a time."""
    part = config["matmul"]
    by_matrix = [
        [
            Matmul(matrix, out, width, rows, by_kernel, config["rotation"], session.dry_run)
            for rows in part["rows"]
            for by_kernel in (True, False)
        ]
        for matrix, (out, width) in part["matrices"].items()
    ]
    check(session, [m for matmuls in by_matrix for m in matmuls if m.by_kernel])
    for matmuls in session.each(by_matrix, lambda matmuls: matmuls[0].matrix):
        jobs = ((matmul, functools.partial(lower, session, matmul)) for matmul in matmuls)
        programs = compile_jobs(jobs, workers=config["compilers"])
        for matmul in matmuls:
            time_one(session, matmul, programs[matmul])


def lower(session: Session, matmul: Matmul) -> jax.stages.Lowered:
    """Return the lowered program of a matmul."""
    carry, rest = jax.eval_shape(matmul.carry), jax.eval_shape(matmul.rest)
    return session.clock.lower(matmul.work, carry, rest)


def check(session: Session, matmuls: list[Matmul]) -> None:
    """Compare the kernel with float64: the smallest matrix, with every number of rows."""
    smallest = min(matmul.matrix_bytes for matmul in matmuls)
    for matmul in (m for m in matmuls if m.matrix_bytes == smallest):
        what = f"{KERNEL}, {matmul.rows} by {matmul.matrix}"
        error = np.inf
        with session.guarded(what):
            x, weights = matmul.rest()
            last = matmul.layers - 1
            step = jax.jit(matmul.work.step)
            got = np.asarray(step(matmul.carry(), (x, weights), jnp.int32(last)))
            want, bound = layer_matmul_reference(np.asarray(x), np.asarray(weights), last)
            error = float(np.max(np.abs(got - want) / bound))
        session.judge(KERNEL, "bf16", what, error)


def time_one(session: Session, matmul: Matmul, program: Any) -> None:
    """Time one matmul and add its row."""
    labels = {"matrix": matmul.matrix, "rows": matmul.rows}
    if matmul.by_kernel and not session.may_time(KERNEL, "bf16", KERNEL, **labels):
        return
    with session.guarded(matmul.name, **labels):
        if isinstance(program, Exception):
            raise program
        rest = jax.jit(matmul.rest)()
        timing: Timing = session.clock.time(matmul.work, program, matmul.carry(), rest)
        fraction = matmul.matrix_bytes / timing.median / session.facts["copy_bytes_s"]
        session.row(matmul.name, **labels, **timing.row, fraction_of_copy=fraction)
