"""Check `kv_write` bit by bit, and time it against XLA's quantize and scatter."""

import functools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.library import FORMATS
from benchmarks._gpu.problems import NONE, TENSOR, TOKEN_HEAD, Shape, copies
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Timing, Work, compile_jobs
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool, write
from jfp8kv.cache.scales import KVScales
from pallas_kernels import kv_write
from pallas_kernels.kv_write.reference import kv_write_reference

FUSED, UNFUSED = "kv_write", "XLA quantize and scatter"


@dataclass(frozen=True)
class CacheWrite:
    """A write of `shape.length` new tokens per request. Each call writes to the next layer."""

    shape: Shape
    element: str
    scales: str
    fused: bool
    rotation: int
    interpret: bool

    @property
    def name(self) -> str:
        """Name of the implementation."""
        return FUSED if self.fused else UNFUSED

    @property
    def layers(self) -> int:
        """Layers of the pool."""
        return min(64, copies(self.shape.cache_bytes("bf16"), self.rotation))

    @property
    def pages(self) -> int:
        """Pages per request."""
        return -(-(self._start + self.shape.length) // self.shape.page_size)

    @property
    def _start(self) -> int:
        """Position of the first token. A decode writes the last slot of its first page."""
        return self.shape.page_size - 1 if self.shape.length == 1 else 0

    @cached_property
    def work(self) -> Work:
        """The timed function."""
        step = self._fused if self.fused else self._unfused
        return Work(step, copies=self.layers, writes=True)

    def carry(self) -> Any:
        """Return the pools."""
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
        """Return new keys and values, and a shuffled page table."""
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
        updated = kv_write(
            **pools,
            **rest,
            element=FORMATS[self.element].dtype,
            first_row=first_row,
            k_inverse=inverse,
            v_inverse=inverse,
            interpret=self.interpret,
        )
        return {name: pool for name, pool in updated._asdict().items() if pool is not None}

    def _unfused(self, pages: KVPool, rest: dict[str, Any], layer: jax.Array) -> KVPool:
        scales = None
        if self.scales != TOKEN_HEAD:
            scales = LayerScales.of(
                KVScales.unit(self.layers),
                layers=self.layers,
                kv_heads=self.shape.kv_heads,
                head_dim=self.shape.head_dim,
            )

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
def _rest(cache_write: CacheWrite) -> dict[str, Any]:
    """Return the inputs; compiled once for both implementations."""
    return cache_write.rest()


def check(session: Session, config: dict[str, Any], seed: int) -> None:
    """Compare the pools of the kernel with those of the NumPy reference, bit by bit."""
    for element in config["elements"]:
        for dynamic in (False, True) if FORMATS[element].is_fp8 else (False,):
            what = f"{FUSED}, {element}, {'token and head' if dynamic else 'channel'} scales"
            error = np.inf
            with session.guarded(what):
                rng = np.random.default_rng(seed)
                error = 2.0 * _count_wrong(element, dynamic, session.dry_run, rng)
            session.judge(FUSED, element, what, error)


def _count_wrong(element: str, dynamic: bool, interpret: bool, rng: np.random.Generator) -> int:
    """Return how many stored elements differ from the reference, in pools of NaN codes."""
    fmt = FORMATS[element]
    heads, channels, page_size, rows = 2, 48, 16, 12
    pool = (2 * rows, heads, page_size, channels)
    arguments: dict[str, Any] = {
        "page_table": rng.permutation(rows).reshape(4, 3).astype(np.int32),
        "start": np.int32([0, 30, 7, 0]),
        "lengths": np.int32([5, 31, 27, 0]),
        "first_row": np.int32(rows),
        "k_offset": rng.normal(0, 50, (heads, channels)).astype(np.float32),
    }
    for name in "kv":
        arguments[name] = rng.normal(0, 200, (4, 20, heads, channels)).astype(np.float32)
        arguments[f"{name}_pages"] = np.full(pool, fmt.nan_code, fmt.storage_dtype)
        if dynamic:
            arguments[f"{name}_exponent"] = np.full(pool[:3], 255, np.uint8)
        else:
            inverse = rng.uniform(0.5, 4, (heads, channels)).astype(np.float32)
            arguments[f"{name}_inverse"] = inverse
    call = jax.jit(lambda arguments: kv_write(**arguments, element=fmt.dtype, interpret=interpret))
    got = call(arguments)
    want = kv_write_reference(**arguments, element=fmt.dtype)
    pairs = zip(got, want, strict=True)
    return sum(int((np.asarray(a) != b).sum()) for a, b in pairs if a is not None)


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per shape, element type and kind of scales, fused and not."""
    todo = [
        CacheWrite(shape, element, scales, fused, config["rotation"], session.dry_run)
        for shape in Shape.all(config, "write")
        for element in config["elements"]
        for scales in ((TENSOR, TOKEN_HEAD) if FORMATS[element].is_fp8 else (NONE,))
        for fused in (True, False)
    ]
    size = config["compilers"]
    for current in (todo[i : i + size] for i in range(0, len(todo), size)):
        jobs = ((write, functools.partial(lower, session, write)) for write in current)
        programs = compile_jobs(jobs, workers=size) if session.left() > 0 else {}
        for cache_write in session.each(current, lambda w: f"{w.shape.name}, {w.element}"):
            time_one(session, cache_write, programs.get(cache_write))


def lower(session: Session, cache_write: CacheWrite) -> jax.stages.Lowered:
    """Return the lowered program of a write."""
    carry, rest = jax.eval_shape(cache_write.carry), jax.eval_shape(cache_write.rest)
    return session.clock.lower(cache_write.work, carry, rest)


def time_one(session: Session, cache_write: CacheWrite, program: Any) -> None:
    """Time one write and add its row."""
    element = cache_write.element
    labels = {
        "shape": cache_write.shape.name,
        "element": element,
        "scales": cache_write.scales,
    }
    if cache_write.fused and not session.may_time(FUSED, element, FUSED, **labels):
        return
    with session.guarded(cache_write.name, **labels):
        if isinstance(program, Exception):
            raise program
        carry = jax.jit(cache_write.carry)()
        rest = _rest(replace(cache_write, fused=True))
        timing: Timing = session.clock.time(cache_write.work, program, carry, rest)
        session.row(cache_write.name, **labels, **timing.row)
