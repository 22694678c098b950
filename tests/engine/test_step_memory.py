"""Memory of compiled steps: the pool is updated in place, and temporaries do not grow with it."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

import jfp8kv
from jfp8kv.cache.config import resolve_cache
from jfp8kv.cache.copy import PageCopies
from jfp8kv.cache.pool import KVPool
from jfp8kv.engine import step
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.options import EngineOptions
from jfp8kv.engine.programs import Program, Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.engine.speculative import decode_speculative
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.state import FULL, PLAIN
from tests.models.test_decoder import REFERENCES

# XLA assigns buffers before LLVM optimizes: the figures do not depend on the optimizations.
pytestmark = pytest.mark.quick_compile

MIB = 2**20
DRAFTS = 3
MIXED = {"default": "fp8_e4m3", "skip": [-1]}

CACHES = [
    ("fp8_e4m3", "auto", True),
    ("fp8_e4m3", "auto", False),
    ("fp8_e5m2", "token_head", True),
    ("bfloat16", "auto", True),
    ("float32", "auto", True),
    (MIXED, "token_head", True),
]
STEPS = [
    *itertools.product(["decode", "prefill"], CACHES),
    *itertools.product(["full decode", "speculative decode", "copy"], CACHES[::5]),
]


def abstract_pool(
    params: jfp8kv.Params, kv_dtype: Any, kv_scales: str, keys_transposed: bool, pool_bytes: int
) -> KVPool:
    """Return the shapes of a pool of `pool_bytes` bytes."""
    cache = resolve_cache(params, kv_dtype, kv_scales, page_size=64, max_tokens_per_dispatch=16)
    cache = dataclasses.replace(cache, keys_transposed=keys_transposed)
    return jax.eval_shape(lambda: cache.new_pool(pool_bytes // cache.page_bytes))


def compile_step(name: str, engine: Engine, pool: KVPool) -> Program:
    """Compile a step over a pool of any size."""
    programs = Programs(engine.model, engine.programs.weights, engine.programs.scales)
    requests = [
        Request([1] * 40, SamplingParams(), np.zeros(2, np.uint32), max_tokens=4) for _ in range(4)
    ]
    if name == "prefill":
        chunks = engine.batch_builder.prefill(ScheduledPrefill(requests, [16] * 4, 16))
        return programs.program(step.prefill, chunks, pool)
    if name == "copy":
        return programs.program(step.copy, PageCopies.of([(0, 1)]), pool)
    min_variant = FULL if name == "full decode" else PLAIN
    batch, variant = engine.batch_builder.decode(ScheduledDecode(requests, 4), min_variant)
    if name == "speculative decode":
        return programs.program(
            decode_speculative, batch, pool, max_steps=16, top=variant.top, drafts=DRAFTS
        )
    return programs.program(step.decode, batch, pool, max_steps=16, top=variant.top)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "kv_scales", "keys_transposed"),
    [pytest.param(name, *cache, id=f"{name}-{'-'.join(map(str, cache))}") for name, cache in STEPS],
)
def test_temporaries_are_the_same_for_64_mib_and_1_gib_and_the_pool_is_aliased(
    name, kv_dtype, kv_scales, keys_transposed
) -> None:
    params = jfp8kv.load(REFERENCES[0])
    options = EngineOptions(
        kv_dtype=kv_dtype,
        kv_scales=kv_scales,
        kv_cache_memory="1MB",
        max_num_seqs=8,
        prompt_lookup=DRAFTS if name == "speculative decode" else 0,
    )
    engine = Engine(params, options)
    temporaries = []
    for size in (64 * MIB, 1024 * MIB):
        pool = abstract_pool(params, kv_dtype, kv_scales, keys_transposed, size)
        memory = compile_step(name, engine, pool).memory
        pool_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
        assert pool_bytes > 0.98 * size and memory.alias_size_in_bytes >= pool_bytes
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1] < 4 * MIB
