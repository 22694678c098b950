"""Time the engine's decode with a large model of random weights: FP8 against bfloat16.

Both have the same KV cache memory, and as many requests as fit. Prompts are not prefilled: their
tokens count as cached, and the pool has random numbers. The lower bound of a step is the time in
which a copy moves its bytes: the weights without embeddings, and the keys and values of all
requests. The kernels of a step are listed.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfp8kv
from benchmarks._common import median
from benchmarks._gpu.problems import random_bits
from benchmarks._gpu.session import Session
from jfp8kv.cache.config import resolve_cache
from jfp8kv.cache.pool import KVPool
from jfp8kv.core.errors import NotSupported
from jfp8kv.core.formats import FORMATS
from jfp8kv.core.sizes import parse_bytes
from jfp8kv.engine.buckets import DECODE_STEPS
from jfp8kv.engine.request import Request, Status
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.names import expected_shapes, unflatten
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.rng import request_key

KV_DTYPES = ("bfloat16", "fp8_e4m3")
MAX_KERNELS = 12  # rows of kernels per step
RANDOM_PAGES = 64  # repeated to fill a pool


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per cache format."""
    part = config["end_to_end"]
    model = config_from_hf(part["model"])
    params = random_params(model)
    for kv_dtype in session.each(KV_DTYPES):
        with session.guarded("decode", kv_dtype=kv_dtype):
            time_decode(session, params, kv_dtype, part)


def random_params(config: ModelConfig) -> jfp8kv.Params:
    """Return random bfloat16 weights, created on the device."""
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 64))

    def create(name: str, shape: tuple[int, ...]) -> jax.Array:
        if "norm" in name:
            return jnp.ones(shape, jnp.bfloat16)
        scale = jnp.bfloat16(shape[-1] ** -0.5)
        return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16) * scale)(next(keys))

    return jfp8kv.Params.from_pytree(
        unflatten({name: create(name, s) for name, s in expected_shapes(config).items()}), config
    )


def time_decode(
    session: Session, params: jfp8kv.Params, kv_dtype: str, part: dict[str, Any]
) -> None:
    """Time dispatches of several tokens, with as many requests as fit."""
    context = part["context"]
    memory = part["kv_cache_memory"]
    rounds = part["rounds"]
    new = DECODE_STEPS * (rounds + 3)
    kv = resolve_cache(
        params,
        kv_dtype,
        "unit" if kv_dtype != "bfloat16" else "auto",
        page_size=64,
        max_tokens_per_dispatch=1,
    )
    requests = max(1, int(parse_bytes(memory) // kv.sequence_bytes(context + new)))
    engine, attention = open_engine(
        params,
        part["attention"],
        kv_dtype=kv_dtype,
        kv_cache_memory=memory,
        max_model_len=context + new,
        max_num_seqs=requests,
        prefix_caching=False,
        kv_scales="auto" if kv_dtype == "bfloat16" else "unit",
    )
    engine.pages = fill_random(engine.pages, FORMATS[kv_dtype].dtype)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    for number in range(requests):
        prompt = rng.integers(0, params.config.vocab, context).tolist()
        key = request_key(None, index=0, engine_seed=0, number=number)
        request = Request(prompt, sampling, key, max_tokens=new)
        assert engine.scheduler.kv_manager.allocate(request, context), (
            "the pool is smaller than planned"
        )
        # As after its prefill.
        request.cached = context - 1
        request.status = Status.RUNNING
        engine.scheduler.running.append(request)

    def dispatch() -> None:
        engine.step()
        engine.settle()

    seconds = []
    for number in range(rounds + 2):  # two warm-up rounds
        began = time.perf_counter()
        before = engine.stats.generated_tokens
        dispatch()
        if number > 1:
            assert engine.stats.generated_tokens - before == DECODE_STEPS * requests, (
                "not every request decoded"
            )
            seconds.append((time.perf_counter() - began) / DECODE_STEPS)
    step = median(seconds)
    embeddings = 0 if params.config.tied_embeddings else params.tree["embed"]["weight"].nbytes
    read = params.nbytes - embeddings + requests * context * kv.bytes_per_token(context)
    bound = read / session.facts["copy_bytes_s"]
    session.row(
        "decode",
        kv_dtype=kv_dtype,
        attention=attention,
        requests=requests,
        context=context,
        kv_cache_memory=memory,
        tokens_s=requests / step,
        step_ms=1e3 * step,
        bound_ms=1e3 * bound,
        fraction_of_bound=bound / step,
    )
    for name, (count, spent) in list(session.clock.kernels(dispatch).items())[:MAX_KERNELS]:
        session.row(
            f"{kv_dtype}: {name}", times=count / DECODE_STEPS, ms=1e3 * spent / DECODE_STEPS
        )


def open_engine(params: jfp8kv.Params, attention: str | None, **sizes: Any) -> tuple[Any, str]:
    """Return an engine with the requested attention, or else the default, and the name of it."""
    try:
        engine = jfp8kv.LLM(params, attention=attention, **sizes).engine
    except NotSupported:
        engine = jfp8kv.LLM(params, **sizes).engine
    return engine, engine.attention.name


def fill_random(pages: KVPool, dtype: np.dtype) -> KVPool:
    """Return the pool filled with a few random pages, repeated."""

    def fill(pool: jax.Array, seed: int) -> jax.Array:
        rows = pool.shape[0]
        size = (min(rows, RANDOM_PAGES), *pool.shape[1:])
        block = random_bits(jax.random.key(seed, impl="rbg"), size, dtype)
        return jnp.tile(block, (-(-rows // block.shape[0]), 1, 1, 1))[:rows]

    fill = jax.jit(fill, static_argnums=1, donate_argnums=0)
    k, v = fill(pages.k_bits, 0), fill(pages.v_bits, 1)
    return KVPool(k, v, pages.k_exponent, pages.v_exponent, layout=pages.layout)
