"""Compile the engine's steps with the GPU kernels, without a GPU.

The model has the shapes of Llama-3.1-8B (arXiv:2407.21783, table 3), without weights. A step must
update the pool in place, must not copy or convert an array of the pool's size, and must need the
same temporary memory for a small and a large pool. A decode step must read the matrices of the
layers in place.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.guards import array_bytes
from benchmarks._gpu.topology import Target
from jfp8kv.attention.matmul import KernelMatmul
from jfp8kv.attention.pallas import PallasAttention
from jfp8kv.cache.config import CacheConfig
from jfp8kv.cache.kernel_write import KernelWrite
from jfp8kv.cache.layout import LayerCacheSpec
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import E4M3, E5M2
from jfp8kv.engine import step
from jfp8kv.engine.batch import BatchBuilder, DecodeBatch, ForwardBatch
from jfp8kv.engine.buckets import Buckets, step_token_budget
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.models.config import ModelConfig, RopeConfig
from jfp8kv.models.names import expected_shapes, unflatten
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.structured import StructuredOutput
from pallas_kernels import paged_decode, paged_prefill

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab=128_256,
    hidden=4096,
    layers=32,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    mlp_hidden=14_336,
    max_len=8192,
    ropes=(RopeConfig(theta=500_000.0),),
    dtype="bfloat16",
)
REQUESTS, CHUNK = 64, 1024
POOL_BYTES = (3 * 2**30, 36 * 2**30)  # of K and V: within and beyond 32-bit offsets
# Of the smallest matrix of a layer.
MATRIX_BYTES = 2 * LLAMA_8B.hidden * LLAMA_8B.kv_heads * LLAMA_8B.head_dim
KERNELS = {
    "decode": ("kv_write", "layer_matmul", "paged_decode"),
    # With many rows, matmuls are left to XLA.
    "prefill": ("kv_write", "paged_prefill"),
}
ARRAY = re.compile(r"= \(?(?P<dtype>[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A step of the engine, `decode` or `prefill`, with this cache."""

    step: str
    spec: LayerCacheSpec
    target: Target

    @property
    def name(self) -> str:
        """Unique name of the case."""
        return f"{self.step} step of Llama-3.1-8B, {self.spec}"


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Temporary bytes, bytes updated in place, kernels and faults of a compiled step."""

    case: StepCase
    temporary_bytes: int
    aliased_bytes: int
    pool_bytes: int
    kernels: tuple[str, ...]
    faults: tuple[str, ...]


def step_cases(target: Target) -> list[StepCase]:
    """Return both steps with FP8 caches, with static and with dynamic scales."""
    specs = (LayerCacheSpec(E4M3), LayerCacheSpec(E5M2, dynamic=True))
    return [StepCase(name, spec, target) for spec in specs for name in ("decode", "prefill")]


def compile_step(case: StepCase) -> StepReport:
    """Compile the step for a small and for a large pool."""
    reports = [_compile(case, size) for size in POOL_BYTES]
    needed = [memory.temp_size_in_bytes for memory, _, _ in reports]
    faults = [
        fault for memory, text, pool_bytes in reports for fault in _faults(memory, text, pool_bytes)
    ]
    if needed[0] != needed[1]:
        faults.append(
            f"needs {needed[0]} temporary bytes with the small pool, {needed[1]} with the large one"
        )
    memory, text, pool_bytes = reports[0]
    kernels = tuple(name for name in KERNELS[case.step] if name in text)
    if missing := set(KERNELS[case.step]) - set(kernels):
        faults.append(f"runs without {', '.join(sorted(missing))}")
    if case.step == "decode":
        faults.extend(_copied_matrices(text))
    return StepReport(
        case,
        needed[0],
        memory.alias_size_in_bytes,
        pool_bytes,
        kernels,
        tuple(dict.fromkeys(faults)),
    )


def _faults(memory: Any, text: str, pool_bytes: int) -> Iterator[str]:
    """Yield pools that are not updated in place, and other arrays of a pool's size."""
    if memory.alias_size_in_bytes < pool_bytes:
        yield f"updates {memory.alias_size_in_bytes} of {pool_bytes} bytes in place"
    one_bytes = pool_bytes // 2 - pool_bytes // 64  # K or V without exponents
    for found in re.finditer(
        rf"{ARRAY.pattern}[^=\n]*? (?P<op>copy|convert|fusion|bitcast-convert)\(", text
    ):
        if array_bytes(found) >= one_bytes:
            yield f"{found['op']} creates {found['dtype']}[{found['shape']}]"


def _copied_matrices(text: str) -> Iterator[str]:
    """Yield arrays with the dtype and the size of a matrix, which a decode step must not create."""
    for found in re.finditer(rf"{ARRAY.pattern}[^=\n]*? (?P<op>copy|fusion)\(", text):
        if found["dtype"] == "bf16" and array_bytes(found) >= MATRIX_BYTES:
            array = f"{found['dtype']}[{found['shape']}]"
            yield f"{found['op']} creates {array}, as large as a matrix"


def _compile(case: StepCase, size: int) -> tuple[Any, str, int]:
    """Return the memory analysis and the text of the program, and the bytes of its pool."""
    kv = CacheConfig(
        (case.spec,) * LLAMA_8B.layers,
        None,
        LLAMA_8B,
        page_size=64,
        max_tokens_per_dispatch=CHUNK,
        keys_transposed=False,
    )
    if not case.spec.dynamic:
        kv = dataclasses.replace(kv, scales=KVScales.unit(LLAMA_8B.layers))
    num_pages = size // kv.page_bytes
    pool = jax.eval_shape(lambda: kv.new_pool(num_pages))
    attend = PallasAttention(
        paged_decode, paged_prefill, capability=case.target.capability, interpret=False
    )
    dtype = np.dtype(jnp.bfloat16)
    model = step.StepModel(LLAMA_8B, dtype, attend, kv.groups, KernelWrite(), KernelMatmul())
    weights = unflatten(
        {
            name: jax.ShapeDtypeStruct(shape, dtype)
            for name, shape in expected_shapes(LLAMA_8B).items()
        }
    )
    scales = jax.eval_shape(kv.layer_scales)
    arguments = (weights, scales, _batch(case.step, kv, num_pages), pool)
    on_target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=case.target.sharding), arguments
    )
    static = {"max_steps": 8} if case.step == "decode" else {}
    function = jax.jit(
        functools.partial(getattr(step, case.step), model, **static), donate_argnums=3
    )
    with case.target.tracing(), mock.patch.object(jax, "default_backend", lambda: "gpu"):
        lowered = function.trace(*on_target).lower()
    program = lowered.compile()
    return (
        program.memory_analysis(),
        program.as_text(),
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool)),
    )


def _batch(name: str, kv: CacheConfig, num_pages: int) -> DecodeBatch | ForwardBatch:
    """Return a batch as the engine builds it. Its tokens and pages do not matter."""
    pages = LLAMA_8B.max_len // kv.page_size
    builder = BatchBuilder(
        buckets=Buckets(REQUESTS, step_token_budget(CHUNK, REQUESTS)),
        vocab=LLAMA_8B.vocab,
        requirements=kv.requirements,
        page_table_length=pages,
        num_pages=num_pages,
        max_model_len=LLAMA_8B.max_len,
        eos_ids=(),
        structured_output=StructuredOutput(None, LLAMA_8B.vocab, eos_ids=()),
    )
    count = REQUESTS if name == "decode" else 4
    requests = [
        Request([1] * CHUNK, SamplingParams(), np.zeros(2, np.uint32), max_tokens=8)
        for _ in range(count)
    ]
    if name == "decode":
        return builder.decode(ScheduledDecode(requests, 8))[0]
    return builder.prefill(ScheduledPrefill(requests, [CHUNK // 4] * count, CHUNK // 4))
