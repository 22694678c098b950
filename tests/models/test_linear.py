"""Matmuls with stacked weights equal indexing the stack first: whole or tiled, values or bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.models import linear
from jfp8kv.models.linear import as_bits, stacked_matmul


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("out", [8, 21, 64, 100])
@pytest.mark.parametrize("tiled", [True, False])
def test_a_stacked_matmul_equals_the_matmul_of_the_layer(monkeypatch, dtype, out, tiled) -> None:
    monkeypatch.setattr(linear, "TILE_BYTES", 4 * 40 * 16)  # tiles of 16 rows
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(3, out, 40)), dtype)
    x = jnp.asarray(rng.normal(size=(2, 5, 40)), jnp.float32)
    matmul = jax.vmap(
        lambda x, w, layer: stacked_matmul(x, w, layer, weight_dtype=np.dtype(dtype), tiled=tiled),
        (0, None, None),
    )
    want = np.asarray(x, np.float64) @ np.asarray(weight[2], np.float64).T
    bound = (
        40
        * 2.0**-23
        * (np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight[2], np.float64)).T)
    )
    for w in (weight, as_bits(weight)):
        assert np.all(np.abs(np.asarray(jax.jit(matmul)(x, w, jnp.int32(2))) - want) <= bound)


def test_bits_share_the_memory_of_the_weights_and_keep_it_alive() -> None:
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.bfloat16)
    want, address = np.asarray(weight).view(np.uint16).copy(), weight.unsafe_buffer_pointer()
    bits = as_bits(weight)
    del weight
    assert bits.unsafe_buffer_pointer() == address and np.array_equal(np.asarray(bits), want)


def test_decoding_never_copies_the_matrix_of_a_layer() -> None:
    """Under scan only a tile is materialized: temporaries are smaller than one widened layer."""
    layers, out, width = 4, 4096, 1024
    weight = jax.ShapeDtypeStruct((layers, out, width), jnp.uint16)

    def run(x, weight):
        def body(x, layer):
            y = stacked_matmul(x, weight, layer, weight_dtype=np.dtype(jnp.bfloat16), tiled=True)
            return x + y[:, :width], None

        return jax.lax.scan(body, x, jnp.arange(layers, dtype=jnp.int32))[0]

    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((1, width), jnp.float32), weight).compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 2 * linear.TILE_BYTES < out * width * 4 / 2
    )
