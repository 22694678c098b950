"""Every kernel against float64, on fresh random data and in every set of options, before any is timed."""

import functools
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu import library, writes
from benchmarks._gpu.batches import Batch, Case, Sizes
from benchmarks._gpu.problems import capability
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import compiled
from pallas_kernels import DecodeBlocks, paged_decode, paged_prefill
from pallas_kernels.elements import multiplied_in
from pallas_kernels.paged_decode.blocks import blocks_for

KERNELS = {"paged_decode": paged_decode, "paged_prefill": paged_prefill}
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "channel scales": ("channel scales",),
    "token and head scales": ("token and head scales",),
    "window": ("window",),
    "soft cap": ("softcap",),
    "sinks": ("sinks",),
    "all of them": ("channel scales", "window", "softcap", "sinks", "score offset"),
    "all of them, dynamic": ("token and head scales", "window", "softcap", "sinks", "score offset"),
}
SIZES = {
    "head_dim 128": {"head_dim": 128, "page_size": 64},
    "head_dim 256": {"head_dim": 256, "page_size": 64},
    "head_dim 80": {"head_dim": 80},
    "pages of 17": {"page_size": 17},
    "a group of 7": {"q_heads": 14},
    "a group of 32": {"q_heads": 64},
    "one program a request": {"split": 1, "page_size": 64},
    "long": {"lengths": (3000, 700), "queries": (9, 40), "page_size": 64},
}
DRY = Sizes(
    lengths=(0, 1, 21), queries=(0, 1, 9), q_heads=4, kv_heads=2, head_dim=16, page_size=8, split=2
)


def cases(elements: list[str], dry_run: bool) -> Iterator[Case]:
    """Plain ones first, so that what there is no time for is not what the timing waits for."""
    if dry_run:
        yield Case(
            "all of them, dynamic",
            "paged_decode",
            elements[0],
            DRY,
            OPTIONS["all of them, dynamic"],
        )
        yield Case("all of them", "paged_prefill", elements[0], DRY, OPTIONS["all of them"])
        yield from (
            Case("plain", kernel, element, DRY) for kernel in KERNELS for element in elements[1:]
        )
        return
    for element in elements:
        yield from (Case("plain", kernel, element) for kernel in KERNELS)
    for kernel in KERNELS:
        for name, options in list(OPTIONS.items())[1:]:
            fits = [
                e
                for e in elements
                if "token and head scales" not in options or e in ("e4m3", "e5m2")
            ]
            yield from (Case(name, kernel, element, Sizes(), options) for element in fits)
        for name, sizes in SIZES.items():
            yield from (
                Case(name, kernel, element, replace(Sizes(), **sizes)) for element in elements
            )
        for element in ("e4m3", "f32"):
            yield Case(
                "float32 queries", kernel, element, Sizes(), OPTIONS["channel scales"], np.float32
            )
        yield Case("plain", kernel, "f16", Sizes(), (), np.float16)


def run(session: Session, config: dict[str, Any]) -> None:
    """A row for each case; what is wrong makes the run fail and is not timed."""
    elements, seed = config["elements"], secrets.randbits(32)
    session.row("random numbers", seed=seed)
    left = list(cases(elements, session.dry_run))
    while left and session.left() > 0:
        some, left = left[: 2 * config["compilers"]], left[2 * config["compilers"] :]
        batches = {case: case.batch(seed + i) for i, case in enumerate(some)}
        jobs = (
            (case, functools.partial(lower, batch, session.dry_run))
            for case, batch in batches.items()
        )
        for case, program in compiled(jobs, workers=config["compilers"]).items():
            check(session, batches[case], program)
    for case in left:
        session.row(str(case), skipped="no time left")
    writes.check(session, config, seed)
    library.check(session, config, seed)


def lower(batch: Batch, interpret: bool) -> jax.stages.Lowered:
    kernel, case = KERNELS[batch.case.kernel], batch.case
    blocks: dict[str, Any] = {}
    if case.kernel == "paged_decode":
        s = case.sizes
        usual = blocks_for(
            requests=len(s.lengths), kv_heads=s.kv_heads, group=s.q_heads // s.kv_heads, head_dim=s.head_dim,
            tokens=max(s.lengths), element=batch.dtype, compute=multiplied_in(batch.dtype, np.dtype(case.q_dtype)),
            page_size=s.page_size,
        )  # fmt: skip
        blocks["blocks"] = DecodeBlocks(usual.block_k, usual.warps, usual.stages, s.split)

    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        how = {"element": batch.dtype, "capability": capability(), "interpret": interpret}
        return kernel(**arrays, **how, **batch.static, **blocks)

    return jax.jit(call).lower(batch.arrays)


def check(session: Session, batch: Batch, program: Any) -> None:
    """One row, and whether the kernel may still be timed."""
    case, error = batch.case, np.inf
    with session.guarded(str(case)):
        if isinstance(program, Exception):
            session.right[case.kernel, case.element] = False
            raise program
        poison(batch.arrays["q"].shape, batch.arrays["q"].dtype)
        got = np.asarray(program({name: jnp.asarray(x) for name, x in batch.arrays.items()}))
        error = batch.error(got)
    session.judge(case.kernel, case.element, str(case), error)


def poison(size: tuple[int, ...], dtype: Any) -> None:
    """Leave NaN in the memory that results of this size are likely to get."""
    jax.block_until_ready([jnp.full(size, jnp.nan, dtype) for _ in range(4)])
