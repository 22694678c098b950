"""Time the same decode with other libraries: JAX's kernels here, PyTorch's in child processes.

The child processes start early, import and compile concurrently, and wait for a line of input
before they time anything. A peer that is missing, fails or takes too long is recorded as such.
"""

import functools
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from benchmarks._gpu.problems import TOKEN_HEAD, Attention, Shape
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Work

# Of jax's paged_attention: pages per block, splits of the keys, and warps.
PAGED_ATTENTION_BLOCKS = (
    (8, 16, 8),
    (2, 16, 4),
    (1, 8, 4),
    (2, 4, 4),
    (1, 1, 4),
    (2, 1, 4),
    (4, 1, 8),
)
TORCH = ("sdpa", "flex", "fa3", "flashinfer")
PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.DEVNULL,
    "text": True,
}
ROOT = Path(__file__).parent.parent.parent


def shape_of(config: dict[str, Any]) -> Shape:
    """Return the shape of the decode."""
    part = config["peers"]
    return Shape("peers", part["requests"], part["length"], **config["heads"])


def start(session: Session, config: dict[str, Any]) -> None:
    """Start a process for each PyTorch kernel. It prints `ready` when it has compiled."""
    s = shape_of(config)
    sizes = {
        name: getattr(s, name)
        for name in ("requests", "length", "q_heads", "kv_heads", "head_dim", "page_size")
    }
    given = json.dumps(
        sizes | {"rotation": config["rotation"], "dry_run": session.dry_run, **config["clock"]}
    )
    command = [sys.executable, "-m", "benchmarks._gpu.torch_peers"]
    session.processes |= {
        name: subprocess.Popen([*command, name, given], **PIPES, cwd=ROOT) for name in TORCH
    }


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per peer."""
    for what, call in session.each(
        jax_peers(shape_of(config), session.dry_run).items(), name=lambda peer: peer[0]
    ):
        with session.guarded(what, ours=False):
            call(session, what)
    for name, process in session.each(list(session.processes.items()), name=lambda peer: peer[0]):
        with session.guarded(name, ours=False):
            for row in read_rows(process, min(session.left(), config["peers"]["patience"])):
                session.row(row.pop("what"), **row)


def jax_peers(s: Shape, dry_run: bool) -> dict[str, Callable[..., None]]:
    """Return JAX's kernels by name. In a dry run XLA replaces cuDNN, which needs a GPU."""
    by = "xla" if dry_run else "cudnn"
    elements = {"e4m3": "FP8"} if dry_run else {"e4m3": "FP8", "bf16": "bfloat16"}
    paged = {
        f"jax paged_attention, {name}": functools.partial(paged_attention, shape=s, element=element)
        for element, name in elements.items()
    }
    return paged | {
        f"jax dot_product_attention ({by}), bfloat16": functools.partial(dense, shape=s, by=by)
    }


def paged_attention(session: Session, what: str, *, shape: Shape, element: str) -> None:
    """Time jax.experimental's kernel with several block sizes, and record the fastest.

    It takes the pages of one layer, with KV heads first.
    """
    from jax.experimental.pallas.ops.gpu.paged_attention import (
        paged_attention as jax_paged_attention,
    )

    problem = Attention(
        shape, element, TOKEN_HEAD if element == "e4m3" else "none", False, 1, session.dry_run
    )
    q, rest = problem.arrays()

    @jax.jit
    def arranged(rest: dict[str, Any]) -> dict[str, Any]:
        bits = {
            name: lax.bitcast_convert_type(rest[name], problem.dtype).swapaxes(0, 1)
            for name in ("k_pages", "v_pages")
        }
        scales = {}
        if element == "e4m3":
            exponents = (rest[f"{name}_exponent"].astype(jnp.float32) - 127 for name in "kv")
            scales = {
                f"{name}_scales_pages": jnp.exp2(e).swapaxes(0, 1)
                for name, e in zip("kv", exponents, strict=True)
            }
        return bits | scales | {"block_tables": rest["page_table"], "lengths": rest["lengths"]}

    want, given = jax.jit(problem.work.step)(q, rest, jnp.int32(0)), arranged(rest)
    fastest: dict[str, Any] = {}
    for pages, splits, warps in (
        PAGED_ATTENTION_BLOCKS[-1:] if session.dry_run else PAGED_ATTENTION_BLOCKS
    ):
        blocks = {
            "pages_per_compute_block": min(pages, shape.pages),
            "k_splits": splits,
            "num_warps": warps,
        }
        if shape.pages % (splits * blocks["pages_per_compute_block"]) or session.left() <= 0:
            continue

        def step(
            q: jax.Array, rest: Any, copy: jax.Array, blocks: dict[str, int] = blocks
        ) -> jax.Array:
            scaled = q * jnp.asarray(shape.head_dim**-0.5, q.dtype)
            out = jax_paged_attention(scaled, **rest, **blocks, interpret=session.dry_run)
            return out.astype(q.dtype)

        with session.guarded(what, ours=False, **blocks):
            figures = timed(session, Work(step), q, given, want)
            if not fastest or figures["us"] < fastest["us"]:
                fastest = figures | blocks
    if fastest:
        session.row(what, shape=shape.name, **fastest)


def dense(session: Session, what: str, *, shape: Shape, by: str) -> None:
    """Time `dot_product_attention` over contiguous bfloat16 keys and values."""
    s, keys = shape, jax.random.split(jax.random.key(4, impl="rbg"))
    size = (s.requests, s.length, s.kv_heads, s.head_dim)
    k, v = (jax.random.normal(key, size, ml_dtypes.bfloat16) for key in keys)
    q = jax.random.normal(jax.random.key(1), (s.requests, 1, s.q_heads, s.head_dim), jnp.bfloat16)

    def step(q: jax.Array, rest: Any, copy: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, *rest, implementation=by)

    want = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    session.row(what, shape=s.name, **timed(session, Work(step), q, (k, v), want))


def timed(session: Session, work: Work, carry: Any, rest: Any, want: jax.Array) -> dict[str, Any]:
    """Return the figures of a row, with the relative error of the first call's result."""
    got, want = (
        np.asarray(x, np.float64) for x in (jax.jit(work.step)(carry, rest, jnp.int32(0)), want)
    )
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert error < 0.1, f"relative error of {error:.2g}: not timed"
    program = session.clock.lower(work, carry, rest).compile()
    return session.clock.time(work, program, carry, rest).row | {"error": error}


def read_rows(process: subprocess.Popen, patience: float) -> list[dict[str, Any]]:
    """Start the timing of a ready process and return its rows.

    Raises `TimeoutError` if it printed none after `patience` seconds, `RuntimeError` if it ended.
    """
    ends = time.perf_counter() + max(1.0, patience)
    rows: list[dict[str, Any]] = []
    started = False
    while time.perf_counter() < ends:
        if not select.select([process.stdout], [], [], 0.2)[0]:
            continue
        line = process.stdout.readline()
        if not line:
            if rows:
                return rows
            raise RuntimeError(f"exited with status {process.wait()} without results")
        if line.strip() == "ready" and not started:
            started = True
            process.stdin.write("go\n")
            process.stdin.flush()
        elif line.startswith("{"):
            rows.append(json.loads(line))
    process.kill()
    if rows:
        return rows
    raise TimeoutError(f"no results after {patience:.0f} s")
