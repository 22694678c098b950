"""Products by the kernel, interpreted: what XLA's are, for all requests at once, and the same text from the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp8kv
from jfp8kv.engine import matmul
from jfp8kv.engine.matmul import MOST_ROWS, KernelMatmul, beside
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
by_kernel = functools.partial(KernelMatmul(interpret=True), stored=FLOAT32, tiled=False)


def arrays(requests: int, tokens: int, width: int = 32) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(requests + tokens)
    x, weights = rng.standard_normal((requests, tokens, width)), rng.standard_normal((3, 24, width))
    return jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)


def kernels(x: jax.Array, weights: jax.Array, stored=FLOAT32) -> int:
    """How many kernels run for these requests."""
    product = jax.vmap(
        functools.partial(by_kernel, stored=np.dtype(stored)), in_axes=(0, None, None)
    )
    return str(jax.make_jaxpr(product)(x, weights, 1)).count("pallas_call[")


def test_requests_are_multiplied_together_by_one_kernel() -> None:
    x, weights = arrays(5, 2)
    got = jax.vmap(by_kernel, in_axes=(0, None, None))(x, weights, jnp.int32(1))
    want, bound = layer_matmul_reference(x.reshape(10, -1), weights, 1)
    assert got.shape == (5, 2, 24) and (np.abs(got.reshape(want.shape) - want) <= bound).all()
    assert kernels(x, weights) == 1


def test_what_the_requests_share_stays_one() -> None:
    x, weights = arrays(1, 2)
    shared = jax.vmap(lambda _: by_kernel(x[0], weights, 1), out_axes=None, axis_size=4)(
        jnp.arange(4)
    )
    np.testing.assert_array_equal(shared, by_kernel(x[0], weights, 1))


def test_many_rows_bits_and_matrices_out_of_line_are_left_to_xla() -> None:
    assert kernels(*arrays(MOST_ROWS // 2, 2)) == 1
    assert kernels(*arrays(MOST_ROWS // 2 + 1, 2)) == 0
    assert kernels(*arrays(2, 1, width=30)) == 0
    x, weights = arrays(2, 1)
    halves = weights.astype(jnp.bfloat16)
    assert kernels(x, halves, jnp.bfloat16) == 1
    assert kernels(x, jax.lax.bitcast_convert_type(halves, jnp.uint16), jnp.bfloat16) == 0


def test_products_are_by_kernel_where_attention_is_and_by_xla_elsewhere() -> None:
    assert beside("pallas") == KernelMatmul() and beside("pallas_interpret") == KernelMatmul(
        interpret=True
    )
    assert beside("xla") is beside("reference") is stacked_matmul


@pytest.mark.parametrize(
    "family", ["llama_gqa", "gpt_oss_saved"]
)  # the second with biases and experts
def test_a_text_is_the_same_by_either_product(family, monkeypatch) -> None:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    sampling = jfp8kv.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

    def tokens() -> list[list[int]]:
        llm = jfp8kv.LLM(params, attention="xla", **SIZES)
        return [out.token_ids for out in llm.generate([list(range(3, 40)), [7, 8]], sampling)]

    by_xla = tokens()
    monkeypatch.setattr(matmul, "beside", lambda _: KernelMatmul(interpret=True))
    assert tokens() == by_xla
