"""Check and time the experimental decode on Mosaic GPU (docs/notes/014).

Runs only if requested by name, because a kernel that has never run on a GPU may hang it. Its errors
do not fail the run.
"""

import secrets
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.attention import describe, labels, problems, time_one
from benchmarks._gpu.checks import OPTIONS
from benchmarks._gpu.random_batches import Case, RandomBatch, Sizes
from benchmarks._gpu.session import Session
from pallas_kernels import paged_decode_mosaic
from pallas_kernels.testing import as_view

NAME = "paged_decode_mosaic"
SIZES = Sizes(q_heads=8, kv_heads=2, head_dim=128, page_size=64)
DRY_RUN_SIZES = Sizes(
    lengths=(0, 70), queries=(0, 1), q_heads=4, kv_heads=2, head_dim=64, page_size=64
)


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per case, then per decode problem."""
    sizes = DRY_RUN_SIZES if session.dry_run else SIZES
    for element in config["elements"]:
        names = ["plain"]
        if element != "bf16":
            names += ["all, static scales", "all, dynamic scales"]
        for name in names:
            case = Case(name, NAME, element, sizes, OPTIONS[name])
            with session.guarded(str(case), ours=False):
                error = check(case.batch(secrets.randbits(32)), session.dry_run)
                session.judge(NAME, element, str(case), error, ours=False)
    for problem in session.each(problems(session, config, "decode"), name=describe):
        mosaic = replace(problem, mosaic=True, blocks=None)
        if session.may_time(NAME, problem.element, NAME, **labels(problem)):
            with session.guarded(NAME, **labels(problem), ours=False):
                carry, rest = jax.eval_shape(mosaic.carry), jax.eval_shape(mosaic.rest)
                program = session.clock.lower(mosaic.work, carry, rest).compile()
                time_one(session, mosaic, program)


def check(batch: RandomBatch, interpret: bool) -> float:
    """Return the largest error of a batch, as a fraction of the bound."""

    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        return paged_decode_mosaic(
            **as_view(arrays), element=batch.dtype, interpret=interpret, **batch.static
        )

    arrays = {name: jnp.asarray(x) for name, x in batch.arrays.items()}
    return batch.error(np.asarray(jax.jit(call)(arrays)))
