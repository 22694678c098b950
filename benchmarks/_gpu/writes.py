"""New keys and values into the pages: the kernel, checked bit by bit, against XLA's quantize and scatter."""

import functools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.library import FORMATS
from benchmarks._gpu.problems import NONE, TENSOR, TOKEN_HEAD, Shape, turns
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Timing, Work, compiled
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool, write
from jfp8kv.cache.scales import KVScales
from pallas_kernels import kv_write
from pallas_kernels.kv_write.reference import kv_write_reference

FUSED, UNFUSED = "kv_write", "XLA quantize and scatter"


@dataclass(frozen=True)
class Writing:
    """`shape.length` new tokens of every request into a pool of several layers, each call into the next."""

    shape: Shape
    element: str
    scales: str
    fused: bool
    rotation: int
    interpret: bool

    @property
    def name(self) -> str:
        return FUSED if self.fused else UNFUSED

    @property
    def layers(self) -> int:
        """Layers written in turn."""
        return min(64, turns(self.shape.cache_bytes("bf16"), self.rotation))

    @property
    def pages(self) -> int:
        """Of one request."""
        return -(-(self._start + self.shape.length) // self.shape.page_size)

    @property
    def _start(self) -> int:
        """A decode writes the last slot of its first page."""
        return self.shape.page_size - 1 if self.shape.length == 1 else 0

    @cached_property
    def work(self) -> Work:
        return Work(self._fused if self.fused else self._unfused, turns=self.layers, writes=True)

    def carry(self) -> Any:
        """The pools."""
        s, fmt = self.shape, FORMATS[self.element]
        rows = s.requests * self.pages
        if not self.fused:
            layout = PoolLayout.uniform(
                fmt, self.layers, dynamic=self.scales == TOKEN_HEAD, keys_transposed=False
            )
            return new_pool(
                layout,
                num_pages=rows,
                page_size=s.page_size,
                kv_heads=s.kv_heads,
                head_dim=s.head_dim,
            )
        size = (self.layers * rows, s.kv_heads, s.page_size, s.head_dim)
        pools = {name: jnp.zeros(size, fmt.storage_dtype) for name in ("k_pages", "v_pages")}
        if self.scales == TOKEN_HEAD:
            pools |= {name: jnp.zeros(size[:3], jnp.uint8) for name in ("k_exponent", "v_exponent")}
        return pools

    def rest(self) -> dict[str, Any]:
        """New keys and values, and where they go: pages in any order."""
        s = self.shape
        keys = jax.random.split(jax.random.key(3, impl="rbg"), 3)
        k, v = (
            jax.random.normal(key, (s.requests, s.length, s.kv_heads, s.head_dim), jnp.bfloat16)
            for key in keys[:2]
        )
        table = jax.random.permutation(
            keys[2], jnp.arange(s.requests * self.pages, dtype=jnp.int32)
        )
        start = jnp.full(s.requests, self._start, jnp.int32)
        rest = {
            "k": k,
            "v": v,
            "page_table": table.reshape(s.requests, self.pages),
            "start": start,
            "lengths": start + s.length,
        }
        if self.scales == TENSOR:
            rest["inverse"] = jnp.full((s.kv_heads, s.head_dim), 1.25)
        return rest

    def _fused(
        self, pools: dict[str, Any], rest: dict[str, Any], layer: jax.Array
    ) -> dict[str, Any]:
        rest = dict(rest)
        inverse = rest.pop("inverse", None)
        first_row = jnp.asarray(layer, jnp.int32) * (self.shape.requests * self.pages)
        made = kv_write(
            **pools, **rest, element=FORMATS[self.element].dtype, first_row=first_row, k_inverse=inverse, v_inverse=inverse,
            interpret=self.interpret,
        )  # fmt: skip
        return {name: pool for name, pool in made._asdict().items() if pool is not None}

    def _unfused(self, pages: KVPool, rest: dict[str, Any], layer: jax.Array) -> KVPool:
        scales = None
        if self.scales != TOKEN_HEAD:
            sizes = {
                "layers": self.layers,
                "kv_heads": self.shape.kv_heads,
                "head_dim": self.shape.head_dim,
            }
            scales = LayerScales.of(KVScales.unit(self.layers), **sizes)

        def one(k: Any, v: Any, table: Any, start: Any, length: Any) -> KVPool:
            return write(
                pages,
                scales,
                k,
                v,
                layer=jnp.int32(layer),
                page_table=table,
                start=start,
                length=length,
            )

        return jax.vmap(one, out_axes=None)(
            *(rest[name] for name in ("k", "v", "page_table", "start", "lengths"))
        )


@functools.partial(jax.jit, static_argnums=0)
def _rest(writing: Writing) -> dict[str, Any]:
    """Compiled once for both ways to write."""
    return writing.rest()


def check(session: Session, config: dict[str, Any], seed: int) -> None:
    """The kernel's pools, bit by bit: what NumPy makes of them, where it belongs, and nothing anywhere else."""
    for element in config["elements"]:
        for dynamic in (False, True)[: 1 + FORMATS[element].is_fp8]:
            what, error = (
                f"{FUSED}, {element}, {'token and head' if dynamic else 'channel'} scales",
                np.inf,
            )
            with session.guarded(what):
                error = 2.0 * _wrong_elements(
                    element, dynamic, session.dry_run, np.random.default_rng(seed)
                )
            session.judge(FUSED, element, what, error)


def _wrong_elements(element: str, dynamic: bool, interpret: bool, rng: np.random.Generator) -> int:
    """How many stored elements are not what the reference stores, in pools that were all NaN codes."""
    fmt, heads, channels, page_size, rows = FORMATS[element], 2, 48, 16, 12
    new = (4, 20, heads, channels)
    given: dict[str, Any] = {name: rng.normal(0, 200, new).astype(np.float32) for name in "kv"}
    given |= {
        f"{name}_pages": np.full(
            (2 * rows, heads, page_size, channels), fmt.nan_code, fmt.storage_dtype
        )
        for name in "kv"
    }
    given["page_table"] = rng.permutation(rows).reshape(4, 3).astype(np.int32)
    given |= {
        "start": np.int32([0, 30, 7, 0]),
        "lengths": np.int32([5, 31, 27, 0]),
        "first_row": np.int32(rows),
    }
    given["k_offset"] = rng.normal(0, 50, (heads, channels)).astype(np.float32)
    if dynamic:
        given |= {
            f"{name}_exponent": np.full((2 * rows, heads, page_size), 255, np.uint8)
            for name in "kv"
        }
    else:
        given |= {
            f"{name}_inverse": rng.uniform(0.5, 4, (heads, channels)).astype(np.float32)
            for name in "kv"
        }
    call = jax.jit(lambda given: kv_write(**given, element=fmt.dtype, interpret=interpret))
    got, want = call(given), kv_write_reference(**given, element=fmt.dtype)
    return sum(
        int((np.asarray(a) != b).sum()) for a, b in zip(got, want, strict=True) if a is not None
    )


def run(session: Session, config: dict[str, Any]) -> None:
    """A row for every shape, element and kind of scales, fused and not."""
    todo = [
        Writing(shape, element, scales, fused, config["rotation"], session.dry_run)
        for shape in Shape.all(config, "write")
        for element in config["elements"]
        for scales in ((TENSOR, TOKEN_HEAD) if FORMATS[element].is_fp8 else (NONE,))
        for fused in (True, False)
    ]
    size = config["compilers"]
    for some in (todo[i : i + size] for i in range(0, len(todo), size)):
        jobs = (
            (
                w,
                lambda w=w: session.clock.lower(
                    w.work, jax.eval_shape(w.carry), jax.eval_shape(w.rest)
                ),
            )
            for w in some
        )
        programs = compiled(jobs, workers=size) if session.left() > 0 else {}
        for writing in session.each(some, lambda w: f"{w.shape.name}, {w.element}"):
            time_one(session, writing, programs.get(writing))


def time_one(session: Session, writing: Writing, program: Any) -> None:
    what = {"shape": writing.shape.name, "element": writing.element, "scales": writing.scales}
    if writing.fused and not session.may_time(FUSED, writing.element, FUSED, **what):
        return
    with session.guarded(writing.name, **what):
        if isinstance(program, Exception):
            raise program
        taken: Timing = session.clock.time(
            writing.work, program, jax.jit(writing.carry)(), _rest(replace(writing, fused=True))
        )
        session.row(writing.name, **what, **taken.row)
