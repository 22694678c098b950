"""Read off the compiled step: the pool is updated in place, and what a step needs besides does not grow with it."""

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
from jfp8kv.engine.programs import Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.engine.speculative import decode_speculative
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.state import FULL, PLAIN
from tests.models.test_decoder import REFERENCES

# XLA lays buffers out before LLVM has its say: the figures are the same with its optimizations and without.
pytestmark = pytest.mark.quick_compile

MIB = 2**20
SKIPPING = {"default": "fp8_e4m3", "skip": [-1]}


def pool_of(
    params: jfp8kv.Params, kv_dtype: Any, kv_scales: str, keys_transposed: bool, pool_bytes: int
) -> KVPool:
    kv = resolve_cache(params, kv_dtype, kv_scales, page_size=64, max_tokens_per_dispatch=16)
    kv = dataclasses.replace(kv, keys_transposed=keys_transposed)
    return jax.eval_shape(lambda: kv.new_pool(pool_bytes // kv.page_bytes))


CACHES = [
    ("fp8_e4m3", "auto", True),
    ("fp8_e4m3", "auto", False),
    ("fp8_e5m2", "token_head", True),
    ("bfloat16", "auto", True),
    ("float32", "auto", True),
    (SKIPPING, "token_head", True),
]
STEPS = [
    *itertools.product(["decode", "prefill"], CACHES),
    *itertools.product(["full decode", "decode ahead", "copy"], CACHES[::5]),
]


@pytest.mark.parametrize(
    ("kind", "kv_dtype", "kv_scales", "keys_transposed"),
    [pytest.param(kind, *cache, id=f"{kind}-{'-'.join(map(str, cache))}") for kind, cache in STEPS],
)
def test_a_steps_memory_is_the_same_for_64_mib_and_1_gib_and_the_pool_is_aliased(
    kind, kv_dtype, kv_scales, keys_transposed
) -> None:
    params = jfp8kv.load(REFERENCES[0])
    sizes = {
        "kv_cache_memory": "1MB",
        "max_num_seqs": 8,
        "prompt_lookup": 3 if kind == "decode ahead" else 0,
    }
    engine = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_scales=kv_scales, **sizes)._engine
    requests = [
        Request([1] * 40, SamplingParams(), np.zeros(2, np.uint32), max_tokens=4) for _ in range(4)
    ]
    if kind == "prefill":
        function, batch, static = (
            step.prefill,
            engine.batch_builder.prefill(ScheduledPrefill(requests, [16] * 4, 16)),
            {},
        )
    elif kind == "copy":
        function, batch, static = step.copy, PageCopies.of([(0, 1)]), {}
    else:
        batch, variant = engine.batch_builder.decode(
            ScheduledDecode(requests, 4), FULL if kind == "full decode" else PLAIN
        )
        function, static = step.decode, {"most_steps": 16, "top": variant.top}
    if kind == "decode ahead":
        function, static = decode_speculative, static | {"drafts": 3}
    temporaries = []
    for size in (64 * MIB, 1024 * MIB):
        programs = Programs(engine.model, engine.programs.weights, engine.programs.scales)
        pool = pool_of(params, kv_dtype, kv_scales, keys_transposed, size)
        memory = programs.program(function, batch, pool, **static).memory
        pool_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
        assert pool_bytes > 0.98 * size and memory.alias_size_in_bytes >= pool_bytes
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1] < 4 * MIB
