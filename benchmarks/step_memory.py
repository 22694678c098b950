"""What a decode step needs besides the pool, read off the compiled program, for pools of 64 MiB and 1 GiB.

    python -m benchmarks.step_memory

The model is SmolLM2 with 16 requests. "naive" is a step over a float8 pool inside `jit`, which XLA:CPU converts whole.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jfp8kv
from benchmarks._common import header, parser, smollm2, table
from jfp8kv.engine import step
from jfp8kv.engine.programs import Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode
from jfp8kv.sampling.params import SamplingParams

MIB = 2**20


def naive(pool_bytes: int) -> tuple[float, float]:
    """Temporaries and aliased bytes of writing 16 tokens into a float8 pool, MiB."""
    pool = jax.ShapeDtypeStruct((pool_bytes // 64, 64), jnp.float8_e4m3fn)
    rows, new = (
        jax.ShapeDtypeStruct((16,), jnp.int32),
        jax.ShapeDtypeStruct((16, 64), jnp.float8_e4m3fn),
    )
    write = jax.jit(lambda pool, rows, new: pool.at[rows].set(new, mode="drop"), donate_argnums=0)
    memory = write.lower(pool, rows, new).compile().memory_analysis()
    return memory.temp_size_in_bytes / MIB, memory.alias_size_in_bytes / MIB


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    rows = []
    for kv_dtype in ("bfloat16", "fp8_e4m3", "fp8_e5m2"):
        llm = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory="32MiB", max_num_seqs=16)
        engine = llm._engine
        requests = [
            Request([1] * 100, SamplingParams(), np.zeros(2, np.uint32), max_tokens=4)
            for _ in range(16)
        ]
        batch = engine.batch_builder.decode(ScheduledDecode(requests, 4))[0]
        for size in (64, 1024):
            pool = jax.eval_shape(
                lambda kv=engine.cache_config, size=size: kv.new_pool(size * MIB // kv.page_bytes)
            )
            programs = Programs(engine.model, engine.programs.weights, engine.programs.scales)
            memory = programs.program(
                step.decode, batch, pool, most_steps=engine.buckets.decode_steps, top=0
            ).memory
            found = memory.temp_size_in_bytes / MIB, memory.alias_size_in_bytes / MIB
            rows.append([f"decode step, {kv_dtype}", f"{size}", *(f"{x:.2f}" for x in found)])
    rows += [
        ["naive write, float8 pool", f"{size}", *(f"{x:.2f}" for x in naive(size * MIB))]
        for size in (64, 1024)
    ]
    table(
        "Memory of a step besides its arguments",
        ["program", "pool MiB", "temporaries MiB", "aliased MiB"],
        rows,
    )


if __name__ == "__main__":
    main()
