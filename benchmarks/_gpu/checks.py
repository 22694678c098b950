"""Compare every kernel with float64 references on new random data, before any is timed."""

import functools
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu import library, writes
from benchmarks._gpu.problems import capability
from benchmarks._gpu.random_batches import Case, RandomBatch, Sizes
from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import compile_jobs
from pallas_kernels import DecodeBlocks, paged_decode, paged_prefill
from pallas_kernels.fp8 import compute_dtype
from pallas_kernels.paged_decode.blocks import choose_blocks
from pallas_kernels.testing import as_view

KERNELS = {"paged_decode": paged_decode, "paged_prefill": paged_prefill}
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "channel scales": ("channel scales",),
    "token and head scales": ("token and head scales",),
    "window": ("window",),
    "soft cap": ("softcap",),
    "sinks": ("sinks",),
    "all, static scales": ("channel scales", "window", "softcap", "sinks", "score offset"),
    "all, dynamic scales": ("token and head scales", "window", "softcap", "sinks", "score offset"),
}
SIZES: dict[str, dict[str, Any]] = {
    "head_dim 128": {"head_dim": 128, "page_size": 64},
    "head_dim 256": {"head_dim": 256, "page_size": 64},
    "head_dim 80": {"head_dim": 80},
    "pages of 17": {"page_size": 17},
    "a group of 7": {"q_heads": 14},
    "a group of 32": {"q_heads": 64},
    "one split": {"splits": 1, "page_size": 64},
    "long": {"lengths": (3000, 700), "queries": (9, 40), "page_size": 64},
}
DRY_RUN_SIZES = Sizes(
    lengths=(0, 1, 21),
    queries=(0, 1, 9),
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    page_size=8,
    splits=2,
)


def cases(elements: list[str], dry_run: bool) -> Iterator[Case]:
    """Yield all cases. Plain ones come first: timing depends on them, and time may run out."""
    if dry_run:
        dynamic, static = "all, dynamic scales", "all, static scales"
        first = elements[0]
        yield Case(dynamic, "paged_decode", first, DRY_RUN_SIZES, OPTIONS[dynamic])
        yield Case(static, "paged_prefill", first, DRY_RUN_SIZES, OPTIONS[static])
        for kernel in KERNELS:
            yield from (Case("plain", kernel, other, DRY_RUN_SIZES) for other in elements[1:])
        return
    for element in elements:
        yield from (Case("plain", kernel, element) for kernel in KERNELS)
    for kernel in KERNELS:
        yield from _variants(kernel, elements)


def _variants(kernel: str, elements: list[str]) -> Iterator[Case]:
    for name, options in list(OPTIONS.items())[1:]:
        dynamic = "token and head scales" in options
        for element in elements:
            if element in ("e4m3", "e5m2") or not dynamic:
                yield Case(name, kernel, element, Sizes(), options)
    for name, sizes in SIZES.items():
        for element in elements:
            yield Case(name, kernel, element, replace(Sizes(), **sizes))
    for element in ("e4m3", "f32"):
        options = OPTIONS["channel scales"]
        yield Case("float32 queries", kernel, element, Sizes(), options, np.float32)
    yield Case("plain", kernel, "f16", Sizes(), (), np.float16)


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per case. A wrong kernel fails the run and is not timed."""
    elements = config["elements"]
    seed = secrets.randbits(32)
    session.row("random numbers", seed=seed)
    remaining = list(cases(elements, session.dry_run))
    size = 2 * config["compilers"]
    while remaining and session.left() > 0:
        current, remaining = remaining[:size], remaining[size:]
        batches = {case: case.batch(seed + i) for i, case in enumerate(current)}
        jobs = (
            (case, functools.partial(lower, batch, session.dry_run))
            for case, batch in batches.items()
        )
        for case, program in compile_jobs(jobs, workers=config["compilers"]).items():
            check(session, batches[case], program)
    for case in remaining:
        session.row(str(case), skipped="no time left")
    writes.check(session, config, seed)
    library.check(session, config, seed)


def lower(batch: RandomBatch, interpret: bool) -> jax.stages.Lowered:
    """Return the lowered kernel of a case."""
    case = batch.case
    sizes = case.sizes
    blocks: dict[str, Any] = {}
    if case.kernel == "paged_decode":
        default = choose_blocks(
            requests=len(sizes.lengths),
            kv_heads=sizes.kv_heads,
            group=sizes.q_heads // sizes.kv_heads,
            head_dim=sizes.head_dim,
            tokens=max(sizes.lengths),
            element=batch.dtype,
            compute=compute_dtype(batch.dtype, np.dtype(case.q_dtype)),
        )
        blocks["blocks"] = DecodeBlocks(
            default.block_k, default.warps, default.stages, sizes.splits
        )

    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        return KERNELS[case.kernel](
            **as_view(arrays),
            **batch.static,
            **blocks,
            element=batch.dtype,
            capability=capability(),
            interpret=interpret,
        )

    return jax.jit(call).lower(batch.arrays)


def check(session: Session, batch: RandomBatch, program: Any) -> None:
    """Add a row, and record whether the kernel may be timed."""
    case = batch.case
    error = np.inf
    with session.guarded(str(case)):
        if isinstance(program, Exception):
            session.correct[case.kernel, case.element] = False
            raise program
        poison_memory(batch.arrays["q"].shape, batch.arrays["q"].dtype)
        got = np.asarray(program({name: jnp.asarray(x) for name, x in batch.arrays.items()}))
        error = batch.error(got)
    session.judge(case.kernel, case.element, str(case), error)


def poison_memory(size: tuple[int, ...], dtype: Any) -> None:
    """Fill memory with NaN that results of this size will probably reuse."""
    jax.block_until_ready([jnp.full(size, jnp.nan, dtype) for _ in range(4)])
