"""The decode on Mosaic GPU, an experiment (docs/notes/014): checked and timed where asked for by name, since a kernel that has
never run on a GPU may hang it. Whatever comes of it, the run has not failed."""

import secrets
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.attention import labels, problems, time_one
from benchmarks._gpu.batches import Batch, Case, Sizes
from benchmarks._gpu.checks import OPTIONS
from benchmarks._gpu.session import Session
from pallas_kernels import paged_decode_mosaic

NAME = "paged_decode_mosaic"
SIZES = Sizes(q_heads=8, kv_heads=2, head_dim=128, page_size=64)
DRY = Sizes(lengths=(0, 70), queries=(0, 1), q_heads=4, kv_heads=2, head_dim=64, page_size=64)


def run(session: Session, config: dict[str, Any]) -> None:
    """A row for each case, then for each of the decode's shapes."""
    for element in config["elements"]:
        for name in (
            ("plain",) if element == "bf16" else ("plain", "all of them", "all of them, dynamic")
        ):
            case = Case(name, NAME, element, DRY if session.dry_run else SIZES, OPTIONS[name])
            with session.guarded(str(case), ours=False):
                error = check(case.batch(secrets.randbits(32)), session.dry_run)
                session.judge(NAME, element, str(case), error, ours=False)
    for one in session.each(
        problems(session, config, "decode"),
        name=lambda a: f"{a.shape.name}, {a.element}, {a.scales}",
    ):
        mosaic = replace(one, mosaic=True, blocks=None)
        if session.may_time(NAME, one.element, NAME, **labels(one)):
            with session.guarded(NAME, **labels(one), ours=False):
                program = session.clock.lower(
                    mosaic.work, jax.eval_shape(mosaic.carry), jax.eval_shape(mosaic.rest)
                ).compile()
                time_one(session, mosaic, program)


def check(batch: Batch, interpret: bool) -> float:
    """The error of one batch, as a share of what is allowed."""
    call = jax.jit(
        lambda arrays: paged_decode_mosaic(
            **arrays, element=batch.dtype, interpret=interpret, **batch.static
        )
    )
    return batch.error(np.asarray(call({name: jnp.asarray(x) for name, x in batch.arrays.items()})))
