"""Temporary memory of a decode step for pools of 64 MiB and 1 GiB, read from the compiled program.

    python -m benchmarks.step_memory

The model is SmolLM2 with 16 requests. "naive" writes to a float8 pool inside `jit`: XLA:CPU
converts the whole pool.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jfp8kv
from benchmarks._common import header, parser, smollm2, table
from jfp8kv.cache.config import CacheConfig
from jfp8kv.cache.pool import KVPool
from jfp8kv.engine import step
from jfp8kv.engine.programs import Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode
from jfp8kv.sampling.params import SamplingParams

MIB = 2**20
POOLS_MIB = (64, 1024)
REQUESTS = 16


def naive_write(pool_bytes: int) -> tuple[float, float]:
    """Return temporaries and aliased MiB of writing 16 tokens to a float8 pool."""
    pool = jax.ShapeDtypeStruct((pool_bytes // 64, 64), jnp.float8_e4m3fn)
    rows = jax.ShapeDtypeStruct((16,), jnp.int32)
    new = jax.ShapeDtypeStruct((16, 64), jnp.float8_e4m3fn)
    write = jax.jit(lambda pool, rows, new: pool.at[rows].set(new, mode="drop"), donate_argnums=0)
    memory = write.lower(pool, rows, new).compile().memory_analysis()
    return memory.temp_size_in_bytes / MIB, memory.alias_size_in_bytes / MIB


def abstract_pool(cache: CacheConfig, size: int) -> KVPool:
    """Return the shapes of a pool of `size` bytes."""
    return jax.eval_shape(lambda: cache.new_pool(size // cache.page_bytes))


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    rows = []
    for kv_dtype in ("bfloat16", "fp8_e4m3", "fp8_e5m2"):
        llm = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory="32MiB", max_num_seqs=REQUESTS)
        engine = llm.engine
        requests = [
            Request([1] * 100, SamplingParams(), np.zeros(2, np.uint32), max_tokens=4)
            for _ in range(REQUESTS)
        ]
        batch, _ = engine.batch_builder.decode(ScheduledDecode(requests, 4))
        programs = Programs(engine.model, engine.programs.weights, engine.programs.scales)
        for size in POOLS_MIB:
            memory = programs.program(
                step.decode,
                batch,
                abstract_pool(engine.cache_config, size * MIB),
                max_steps=engine.buckets.decode_steps,
                top=0,
            ).memory
            temporaries = memory.temp_size_in_bytes / MIB
            aliased = memory.alias_size_in_bytes / MIB
            rows.append(
                [f"decode step, {kv_dtype}", f"{size}", f"{temporaries:.2f}", f"{aliased:.2f}"]
            )
    for size in POOLS_MIB:
        temporaries, aliased = naive_write(size * MIB)
        rows.append(["naive write, float8 pool", f"{size}", f"{temporaries:.2f}", f"{aliased:.2f}"])
    columns = ["program", "pool MiB", "temporaries MiB", "aliased MiB"]
    table("Memory of a step besides its arguments", columns, rows)


if __name__ == "__main__":
    main()
