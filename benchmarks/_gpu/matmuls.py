"""Few rows times one layer's matrix of a stack: the kernel, checked, against XLA's product, which copies the matrix first."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.problems import turns
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Timing, Work, compiled
from jfp8kv.models.linear import stacked_matmul
from pallas_kernels import layer_matmul
from pallas_kernels.layer_matmul.reference import layer_matmul_reference

KERNEL, XLA = "layer_matmul", "XLA product"
BFLOAT16 = np.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Product:
    """Rows times a matrix in bfloat16, each call by the matrix of the next layer."""

    matrix: str
    out: int
    width: int
    rows: int
    by_kernel: bool
    rotation: int
    interpret: bool

    @property
    def name(self) -> str:
        return KERNEL if self.by_kernel else XLA

    @property
    def matrix_bytes(self) -> int:
        return self.out * self.width * BFLOAT16.itemsize

    @property
    def layers(self) -> int:
        return max(2, turns(self.matrix_bytes, self.rotation))

    @cached_property
    def work(self) -> Work:
        return Work(self._step, turns=self.layers)

    def carry(self) -> jax.Array:
        """Where the product goes."""
        return jnp.zeros((self.rows, self.out), jnp.float32)

    def rest(self) -> tuple[jax.Array, jax.Array]:
        """Rows and weights."""
        keys = jax.random.split(jax.random.key(5, impl="rbg"))
        x = jax.random.normal(keys[0], (self.rows, self.width), jnp.bfloat16)
        return x, jax.random.normal(keys[1], (self.layers, self.out, self.width), jnp.bfloat16)

    def _step(self, _: jax.Array, rest: tuple[jax.Array, jax.Array], layer: jax.Array) -> jax.Array:
        x, weights = rest
        if self.by_kernel:
            return layer_matmul(x, weights, layer, interpret=self.interpret)
        return stacked_matmul(x, weights, layer, weight_dtype=BFLOAT16, tiled=False)


def run(session: Session, config: dict[str, Any]) -> None:
    """A row for every matrix, number of rows and way to multiply; programs are compiled a matrix at a time."""
    asked = config["product"]
    todo = [
        [
            Product(matrix, out, width, rows, by_kernel, config["rotation"], session.dry_run)
            for rows in asked["rows"]
            for by_kernel in (True, False)
        ]
        for matrix, (out, width) in asked["matrices"].items()
    ]
    check(session, [product for products in todo for product in products if product.by_kernel])
    for products in session.each(todo, lambda products: products[0].matrix):
        jobs = (
            (
                p,
                lambda p=p: session.clock.lower(
                    p.work, jax.eval_shape(p.carry), jax.eval_shape(p.rest)
                ),
            )
            for p in products
        )
        programs = compiled(jobs, workers=config["compilers"])
        for product in products:
            time_one(session, product, programs[product])


def check(session: Session, products: list[Product]) -> None:
    """The smallest matrix by every number of rows, against float64."""
    smallest = min(product.matrix_bytes for product in products)
    for product in (p for p in products if p.matrix_bytes == smallest):
        what, error = f"{KERNEL}, {product.rows} by {product.matrix}", np.inf
        with session.guarded(what):
            x, weights = product.rest()
            last = product.layers - 1
            got = np.asarray(
                jax.jit(product.work.step)(product.carry(), (x, weights), jnp.int32(last))
            )
            want, bound = layer_matmul_reference(np.asarray(x), np.asarray(weights), last)
            error = float(np.max(np.abs(got - want) / bound))
        session.judge(KERNEL, "bf16", what, error)


def time_one(session: Session, product: Product, program: Any) -> None:
    what = {"matrix": product.matrix, "rows": product.rows}
    if product.by_kernel and not session.may_time(KERNEL, "bf16", KERNEL, **what):
        return
    with session.guarded(product.name, **what):
        if isinstance(program, Exception):
            raise program
        taken: Timing = session.clock.time(
            product.work, program, product.carry(), jax.jit(product.rest)()
        )
        share = product.matrix_bytes / taken.median / session.facts["copy_bytes_s"]
        session.row(product.name, **what, **taken.row, share_of_copy=share)
