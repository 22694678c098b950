"""Matmuls by the interpreted GPU kernel: the results of XLA, and the same output tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp8kv
from jfp8kv.attention.matmul import MAX_ROWS, KernelMatmul, select_matmul
from jfp8kv.engine import engine as engine_module
from jfp8kv.models.linear import stacked_matmul
from pallas_kernels.layer_matmul.reference import layer_matmul_reference
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FLOAT32 = np.dtype(np.float32)
SIZES = {
    "max_model_len": 64,
    "max_num_seqs": 2,
    "page_size": 8,
    "kv_cache_memory": "400kB",
    "max_num_batched_tokens": 16,
}
by_kernel = functools.partial(KernelMatmul(interpret=True), weight_dtype=FLOAT32, tiled=False)


def arrays(requests: int, tokens: int, width: int = 32) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(requests + tokens)
    x, weights = rng.standard_normal((requests, tokens, width)), rng.standard_normal((3, 24, width))
    return jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)


def kernels(x: jax.Array, weights: jax.Array, weight_dtype=FLOAT32) -> int:
    """Return how many kernels run for these requests."""
    matmul = jax.vmap(
        functools.partial(by_kernel, weight_dtype=np.dtype(weight_dtype)), in_axes=(0, None, None)
    )
    return str(jax.make_jaxpr(matmul)(x, weights, 1)).count("pallas_call[")


def test_one_kernel_multiplies_the_rows_of_all_requests() -> None:
    x, weights = arrays(5, 2)
    got = jax.vmap(by_kernel, in_axes=(0, None, None))(x, weights, jnp.int32(1))
    want, bound = layer_matmul_reference(x.reshape(10, -1), weights, 1)
    assert got.shape == (5, 2, 24) and (np.abs(got.reshape(want.shape) - want) <= bound).all()
    assert kernels(x, weights) == 1


def test_an_input_shared_by_the_requests_is_multiplied_once() -> None:
    x, weights = arrays(1, 2)
    shared = jax.vmap(lambda _: by_kernel(x[0], weights, 1), out_axes=None, axis_size=4)(
        jnp.arange(4)
    )
    np.testing.assert_array_equal(shared, by_kernel(x[0], weights, 1))


def test_many_rows_bits_and_unaligned_matrices_are_left_to_xla() -> None:
    assert kernels(*arrays(MAX_ROWS // 2, 2)) == 1
    assert kernels(*arrays(MAX_ROWS // 2 + 1, 2)) == 0
    assert kernels(*arrays(2, 1, width=30)) == 0
    x, weights = arrays(2, 1)
    halves = weights.astype(jnp.bfloat16)
    assert kernels(x, halves, jnp.bfloat16) == 1
    assert kernels(x, jax.lax.bitcast_convert_type(halves, jnp.uint16), jnp.bfloat16) == 0


def test_matmuls_use_the_kernel_if_attention_does_and_xla_otherwise() -> None:
    assert select_matmul("pallas") == KernelMatmul()
    assert select_matmul("pallas_interpret") == KernelMatmul(interpret=True)
    assert select_matmul("xla") is select_matmul("reference") is stacked_matmul


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_oss_saved"], ids=["dense", "experts, biases"])
def test_output_tokens_are_the_same_with_either_matmul(family, monkeypatch) -> None:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    sampling = jfp8kv.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

    def tokens() -> list[list[int]]:
        llm = jfp8kv.LLM(params, attention="xla", **SIZES)
        return [out.token_ids for out in llm.generate([list(range(3, 40)), [7, 8]], sampling)]

    by_xla = tokens()
    monkeypatch.setattr(engine_module, "select_matmul", lambda _: KernelMatmul(interpret=True))
    assert tokens() == by_xla
