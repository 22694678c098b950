"""Both attention kernels, interpreted, against float64 loops over the same stored bits.

Outputs must be within the derived error bound (`pallas_kernels/error_bound.py`). Unwritten slots
have NaN codes, so any read of them shows.
"""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels import DecodeBlocks, PrefillBlocks
from pallas_kernels.fp8 import BFLOAT16, E4M3, E5M2, ELEMENTS
from pallas_kernels.testing import BLOCKS, KERNELS, LENGTHS, NAN_CODE, OUTSIDE, Batch, call

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.quick_compile
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_query = pytest.mark.parametrize(
    "q_dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"]
)


@each_kernel
@each_query
@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_every_element_type_with_every_query_dtype(kernel, q_dtype, element) -> None:
    Batch(element=element, q_dtype=q_dtype).check(kernel)


SHAPES = {  # head_dim, kv_heads, group, page_size, block_k, splits, block_m
    "head_dim 32, groups of 1, pages of 1": (32, 2, 1, 1, 16, 1, 16),
    "head_dim 64, groups of 3, pages of 5": (64, 2, 3, 5, 16, 2, 16),
    "head_dim 80, groups of 4, a block is a page": (80, 1, 4, 16, 16, 5, 32),
    "head_dim 96, groups of 7, four blocks in a page": (96, 2, 7, 64, 16, 2, 16),
    "head_dim 128, groups of 8, a block is two pages": (128, 1, 8, 16, 32, 1, 16),
    "head_dim 256, groups of 16, more splits than blocks": (256, 1, 16, 5, 16, 20, 32),
    "head_dim 64, 32 heads of one KV head": (64, 1, 32, 64, 64, 2, 16),
    "head_dim 8, 4 KV heads, pages of 1": (8, 4, 2, 1, 64, 5, 16),
}


@each_kernel
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_heads_pages_and_blocks(kernel, shape) -> None:
    head_dim, kv_heads, group, page_size, block_k, splits, block_m = shape
    lengths = (0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size + 3, 40)
    queries = (0, 1, page_size - 1, 1, min(page_size + 1, 7), 5, 20)
    sizes = {"head_dim": head_dim, "kv_heads": kv_heads, "group": group, "page_size": page_size}
    batch = Batch(
        q_dtype=jnp.bfloat16 if group > 2 else jnp.float32,
        lengths=lengths,
        queries=queries,
        **sizes,
    )
    blocks = {
        "decode": DecodeBlocks(block_k, 4, 1, splits),
        "prefill": PrefillBlocks(block_m, block_k, 4, 1),
    }
    batch.check(kernel, blocks=blocks[kernel])


OPTIONS = {
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": 2.0},
    "score_offset": {"score_offset": 3.0},
    "sm_scale": {"sm_scale": 0.7},
    "static scales": {"static": (0.3, 5.0)},
    "dynamic scales": {"dynamic": True},
}
OPTIONS["all, static"] = {
    k: v for name in OPTIONS if name != "dynamic scales" for k, v in OPTIONS[name].items()
}
OPTIONS["all, dynamic"] = OPTIONS["all, static"] | OPTIONS["dynamic scales"]


@each_kernel
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_and_all_of_them_combined(kernel, options) -> None:
    batch = Batch(q_dtype=jnp.bfloat16, **options)
    for window in (0, 1, 4, 5, 100) if "window" in options else (None,):
        batch.check(kernel, **({} if window is None else {"window": window}))


@each_kernel
def test_all_options_in_float32(kernel) -> None:
    Batch(element=E5M2, **OPTIONS["all, dynamic"]).check(kernel)


@each_kernel
@pytest.mark.parametrize(
    ("q_dtype", "element"),
    [(jnp.float32, E4M3), (jnp.bfloat16, E4M3), (jnp.bfloat16, E5M2), (jnp.float16, E5M2)],
)
def test_dynamic_scales_may_differ_by_more_than_a_million(kernel, q_dtype, element) -> None:
    """Random, increasing and decreasing scales: the largest is in any, the last or first block."""
    sizes = {"lengths": (0, 1, 17, 40, 50), "queries": (0, 1, 2, 3, 9)}
    for spread, order in ((20, None), (40, None), (20, 1), (20, -1)):
        batch = Batch(element=element, q_dtype=q_dtype, dynamic=True, spread=spread, **sizes)
        for request, length in enumerate(batch.lengths if order else ()):
            increasing = np.linspace(127 - spread, 127, length).astype(np.uint8)[::order]
            for token, exponent in enumerate(increasing):
                batch.options["k_exponent"][batch.slot(request, token)] = 127 - exponent % 3
                batch.options["v_exponent"][batch.slot(request, token)] = exponent
        batch.check(kernel, blocks={"decode": DecodeBlocks(16, 4, 1, 1)}.get(kernel))


@each_kernel
@each_query
def test_no_scale_or_query_overflows_float16(kernel, q_dtype) -> None:
    """Dynamic scales bring the scores back to magnitudes at which keys differ."""
    largest = 1e4 if q_dtype == jnp.float16 else 1e30
    for query, k_scale, v_scale in (
        (1, 1e6, 1e-6),
        (1e3, 1e6, 1e3),
        (1e-2, 1e-6, 1.0),
        (largest, 1 / largest, 1.0),
    ):
        batch = Batch(q_dtype=q_dtype, static=(k_scale, v_scale), dynamic=True)
        batch.q, batch.decode_q = query * batch.q, query * batch.decode_q
        written = batch.options["k_exponent"] != 255
        batch.options["k_exponent"] -= (
            np.where(written, np.round(np.log2(query * k_scale)), 0).astype(np.int8).view(np.uint8)
        )
        batch.check(kernel)


@each_kernel
def test_weights_of_a_millionth_retain_their_precision(kernel) -> None:
    """With a sink that has nearly all weight. Unshifted float16 weights would have five bits."""
    batch = Batch(q_dtype=jnp.float16, static=(1.0, 1e5))
    arguments = batch.arguments(kernel) | {"sinks": np.full(batch.q_heads, 14.0, np.float32)}
    batch.compare(kernel, batch.run(kernel, arguments, BLOCKS[kernel]), arguments)


@each_kernel
def test_huge_values_with_huge_scales(kernel) -> None:
    """The soft cap limits scores of 1e36; bfloat16 represents outputs of 1e6."""
    batch = Batch(q_dtype=jnp.bfloat16, static=(1e6, 1e6), softcap=5.0)
    batch.q, batch.decode_q = 1e30 * batch.q, 1e30 * batch.decode_q
    batch.check(kernel)


@each_kernel
def test_zero_queries_average_all_values_and_nan_stays_in_its_row(kernel) -> None:
    for q_dtype in (jnp.float32, jnp.bfloat16):
        batch = Batch(q_dtype=q_dtype)
        batch.q[::3], batch.decode_q[::3] = 0, 0
        batch.q[1::3, 2, 5], batch.decode_q[1::3, 2, 5] = np.nan, np.nan
        batch.check(kernel)


@each_kernel
def test_a_nan_key_affects_only_the_queries_that_attend_to_it(kernel) -> None:
    batch = Batch()
    row, _, offset = batch.slot(7, 21)  # both queries of the chunk attend to it
    batch.k_pages[row, 1, offset, 3] = NAN_CODE[1]
    row, _, offset = batch.slot(5, 10)  # in the middle of a chunk
    batch.k_pages[row, 0, offset, 3] = NAN_CODE[1]
    batch.check(kernel)


def test_a_nan_value_affects_only_its_channel() -> None:
    batch = Batch()
    row, _, offset = batch.slot(7, 21)
    batch.v_pages[row, 1, offset, 3] = NAN_CODE[1]
    batch.check("decode")


def test_a_nan_value_in_a_chunk_affects_no_other_request_head_or_channel() -> None:
    batch = Batch()
    row, _, offset = batch.slot(5, 10)
    batch.v_pages[row, 1, offset, 3] = NAN_CODE[1]
    got = batch.run("prefill", batch.arguments("prefill"), BLOCKS["prefill"])
    nan = np.isnan(got)
    mine = np.arange(batch.tokens)[:, None, None] - batch.first_query[5]
    channel = (np.arange(batch.q_heads)[:, None] >= 3) & (np.arange(batch.head_dim) == 3)
    assert np.all(nan <= ((mine >= 0) & (mine < batch.queries[5]) & channel))
    attending = (mine >= 10 - 4) & (mine < batch.queries[5]) & channel
    assert np.all(nan >= attending)


@each_kernel
@pytest.mark.parametrize(
    ("q_dtype", "dynamic"), [(jnp.float32, False), (jnp.bfloat16, True)], ids=["static", "dynamic"]
)
def test_tokens_outside_all_windows_are_not_read(kernel, q_dtype, dynamic) -> None:
    batch = Batch(q_dtype=q_dtype, dynamic=dynamic, window=3)
    queries = np.minimum(batch.lengths, 1) if kernel == "decode" else batch.queries
    for request, first in enumerate(batch.lengths - queries - 2):
        batch.poison(request, range(first))
        batch.page_table[request, : max(first, 0) // batch.page_size] = OUTSIDE
    batch.check(kernel)


@each_kernel
def test_requests_can_share_pages(kernel) -> None:
    batch = Batch(lengths=(9, 11, 8), queries=(1, 3, 0))
    batch.page_table[1:, :2] = batch.page_table[0, :2]
    batch.check(kernel)


@each_kernel
def test_both_e4m3_conversions_give_the_same_bits(kernel) -> None:
    batch = Batch(q_dtype=jnp.bfloat16)
    arguments = batch.arguments(kernel)
    outs = [
        batch.run(kernel, arguments | {"capability": capability}, BLOCKS[kernel])
        for capability in ((9, 0), (8, 0))
    ]
    assert outs[0].tobytes() == outs[1].tobytes()


def test_padding_rows_give_zeros() -> None:
    kernel = "prefill"
    batch = Batch(sinks=1.0)
    batch.q[:] = np.nan
    got = batch.run(kernel, batch.arguments(kernel), BLOCKS[kernel])
    row = np.arange(batch.tokens)[:, None]
    real = ((row >= batch.first_query) & (row < batch.first_query + batch.queries)).any(1)
    assert np.all(got[~real] == 0) and np.all(np.isnan(got[real]))
    batch.queries[:] = 0
    assert np.all(batch.run(kernel, batch.arguments(kernel), BLOCKS[kernel]) == 0)


ROW_LENGTHS = st.tuples(st.integers(0, 20), st.integers(0, 20))


@each_kernel
@settings(max_examples=15)
@given(
    chunks=st.lists(ROW_LENGTHS, min_size=5, max_size=5),
    window=st.none() | st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_ragged_batches_over_shuffled_pages(kernel, chunks, window, seed) -> None:
    lengths, queries = tuple(a + b for a, b in chunks), tuple(b for _, b in chunks)
    batch = Batch(
        lengths=lengths, queries=queries, tokens=105, num_pages=55, dynamic=True, seed=seed
    )
    batch.check(kernel, **({} if window is None else {"window": window}))


@each_kernel
@pytest.mark.parametrize("sliced", [True, False], ids=["sliced", "read in place"])
def test_layers_under_scan_have_separate_pages_windows_sinks_and_scales(kernel, sliced) -> None:
    batch = Batch()
    for pages in (batch.k_pages, batch.v_pages):
        pages[: batch.num_pages] = pages[batch.num_pages :] ^ np.uint8(0x80)
    arguments = batch.arguments(kernel)
    layers = {"first_row": np.int32([0, batch.num_pages]), "window": np.int32([0, 3])}
    layers["sinks"] = np.float32(batch.rng.normal(size=(2, batch.q_heads)))
    layers |= {
        name: np.float32(batch.rng.uniform(1, 2, (2, 2, batch.head_dim)))
        for name in ("k_scale", "v_scale")
    }

    @jax.jit
    def run(arguments, layers):
        def one(_, layer):
            if sliced:
                by_layer = {name: x[layer] for name, x in layers.items()}
            else:
                by_layer = layers | {"layer": layer}
            return (), call(kernel, arguments | by_layer, element=E4M3)

        return jax.lax.scan(one, (), jnp.arange(2, dtype=jnp.int32))[1]

    given = [{name: jnp.asarray(x) for name, x in some.items()} for some in (arguments, layers)]
    for layer, got in enumerate(run(*given)):
        batch.compare(kernel, got, arguments | layers | {"layer": layer})


@each_kernel
def test_batches_under_vmap_share_a_pool(kernel) -> None:
    batch = Batch(sinks=1.0)
    arguments = batch.arguments(kernel)
    batched = ["q", "page_table", "lengths"] + ["first_query", "queries"] * (kernel == "prefill")
    order = np.arange(len(LENGTHS))[::-1]
    other = {
        name: -arguments[name] if name == "q" and kernel == "prefill" else arguments[name][::-1]
        for name in batched
    }
    if kernel == "prefill":
        other["first_query"] = arguments["first_query"][order]
    shared = {name: jnp.asarray(x) for name, x in arguments.items() if name not in batched}
    both = {name: jnp.stack([arguments[name], other[name]]) for name in batched}
    outs = jax.jit(
        jax.vmap(
            lambda batch, shared: call(kernel, batch | shared, element=E4M3), in_axes=(0, None)
        )
    )(both, shared)
    for got, mine in zip(outs, (arguments, arguments | other), strict=True):
        batch.compare(kernel, got, mine)


SHARDED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.testing import Batch, call
from pallas_kernels.fp8 import E4M3

mesh = jax.sharding.Mesh(jax.devices(), ("heads",))
batch = Batch(kv_heads=2, group=2, dynamic=True, static=(0.5, 2.0), sinks=1.0)
second = {"q", "k_pages", "v_pages", "k_exponent", "v_exponent"}
for kernel in ("decode", "prefill"):
    arguments = {name: np.asarray(x) for name, x in batch.arguments(kernel).items()}
    specs = {name: P(None, "heads") if name in second else P() for name in arguments}
    specs |= {name: P("heads") for name in ("sinks", "k_scale", "v_scale")}
    run = jax.shard_map(
        lambda arguments: call(kernel, arguments, element=E4M3),
        mesh=mesh, in_specs=(specs,), out_specs=P(None, "heads"), check_vma=False,
    )
    arguments["first_row"] = int(arguments["first_row"])
    batch.compare(kernel, jax.jit(run)(arguments), arguments)
print("done on", jax.device_count())
"""


def test_heads_can_be_sharded() -> None:
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error", "-c", SHARDED]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "done on 2" in done.stdout, done.stderr


@each_kernel
def test_the_dtype_of_a_pool_of_values_is_its_element_type(kernel) -> None:
    batch = Batch(element=BFLOAT16)
    arguments = {name: jnp.asarray(x) for name, x in batch.arguments(kernel).items()}
    arguments |= {name: arguments[name].view(jnp.bfloat16) for name in ("k_pages", "v_pages")}
    batch.compare(
        kernel,
        jax.jit(lambda arguments: call(kernel, arguments))(arguments),
        batch.arguments(kernel),
    )
