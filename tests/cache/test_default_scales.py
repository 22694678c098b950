"""Caches of models without scales: scale 1, and an offset for layers with a large K bias."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jfp8kv
from jfp8kv.cache.config import CacheConfig, resolve_cache
from jfp8kv.checkpoint.load import read_checkpoint_info
from jfp8kv.models.key_bias import KeyStats
from tests.models.test_decoder import FAMILIES, rms

pytestmark = pytest.mark.quick_compile

ROOT = FAMILIES[0].parent
SIZES = {"kv_cache_memory": "1MB", "max_model_len": 64, "max_num_seqs": 1, "page_size": 16}
BIASED = ROOT / "llama_mha_bias"
LONGEST = 64


def load(name: str) -> jfp8kv.Params:
    return jfp8kv.load(ROOT / name, dtype="float32")


def resolved(params: jfp8kv.Params, kv_dtype: str = "fp8_e4m3", kv_scales="auto") -> CacheConfig:
    return resolve_cache(
        params, kv_dtype, kv_scales, page_size=16, max_tokens_per_dispatch=16, max_model_len=LONGEST
    )


def with_bias(size: float, *, pair: int, layer: int = 1) -> jfp8kv.Params:
    """Return a model with a K bias of `size` in one layer: the first channel of a pair.

    RoPE rotates pair -1 slowest.
    """
    params = load("llama_mha_bias")
    c, layers = params.config, dict(params.tree["layers"])
    bias = np.array(layers["k"]["bias"]).reshape(c.layers, c.kv_heads, 2, c.head_dim // 2)
    bias[layer, :, 0, pair] = size
    layers["k"] = layers["k"] | {"bias": jnp.asarray(bias.reshape(c.layers, -1))}
    slow = dataclasses.replace(
        c.ropes[0], theta=1e6
    )  # as in Qwen2: the last pair hardly rotates over the sequences of these tests
    return jfp8kv.Params(
        params.tree | {"layers": layers}, dataclasses.replace(c, ropes=(slow,)), params.tokenizer
    )


@pytest.mark.parametrize(
    "name",
    ["llama_gqa", "llama_mha_bias", "gpt2_saved", "qwen2_moe_window", "olmo2_gqa", "qwen3_tied"],
)
def test_ordinary_models_have_scale_1_and_no_offset(name) -> None:
    kv = resolved(load(name))
    assert kv.scales.k_offset is None and np.all(kv.scales.k == 1) and np.all(kv.scales.v == 1)


def test_the_k_bias_contains_the_projected_bias_of_the_norm() -> None:
    """GPT-2's LayerNorm has a bias, which the projection adds to the K bias."""
    params = load("gpt2_saved")
    k, norm = (
        {name: np.asarray(leaf, np.float64) for name, leaf in params.tree["layers"][which].items()}
        for which in ("k", "attention_norm")
    )
    found = KeyStats.from_weights(params.tree, params.config)
    for layer in range(params.config.layers):
        want = k["bias"][layer] + k["weight"][layer] @ norm["bias"][layer]
        np.testing.assert_allclose(found.bias[layer].ravel(), want, rtol=0, atol=1e-6)
        spread = np.sqrt(np.sum((k["weight"][layer] * norm["weight"][layer]) ** 2, axis=1))
        np.testing.assert_allclose(found.spread[layer].ravel(), spread, rtol=1e-6)


@pytest.mark.parametrize("size", [50.0, 2000.0])
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_a_large_k_bias_costs_nothing_where_scale_1_loses_the_keys(size, kv_dtype) -> None:
    """Also beyond 448, where E4M3 would clip. Compared with the same model without the bias."""
    ids = np.random.default_rng(2).integers(0, 100, LONGEST).tolist()

    def error(params: jfp8kv.Params, **cache) -> float:
        exact = jfp8kv.LLM(params, kv_dtype="float32", **SIZES).logits(ids)
        return rms(jfp8kv.LLM(params, kv_dtype=kv_dtype, **cache, **SIZES).logits(ids), exact)

    params = with_bias(size, pair=-1)
    found = error(params)
    assert found < 1.1 * error(with_bias(0.0, pair=-1))
    assert (
        found < error(params, kv_scales="unit") / 1.5
        and found < error(params, kv_scales="token_head") / 1.5
    )


def test_only_layers_that_need_an_offset_have_one_and_bytes_do_not_change() -> None:
    params = with_bias(300.0, pair=-1)
    kv, unit = resolved(params), resolved(params, kv_scales="unit")
    assert np.flatnonzero(kv.scales.k_offset.any(axis=(1, 2))).tolist() == [1]
    assert (
        np.all(kv.scales.k[0] == 1) and kv.page_bytes == unit.page_bytes and kv.specs == unit.specs
    )


def test_scales_cover_the_deviation_of_a_k_bias_that_rotates_a_little() -> None:
    """A pair that rotates by less than a radian over the longest sequence stays in range."""
    params = with_bias(3000.0, pair=-1)
    kv = resolved(params)
    keys = KeyStats.from_weights(params.tree, params.config)
    positions = np.arange(LONGEST)
    half = params.config.head_dim // 2
    radians = positions * 1e6 ** -((half - 1) / half)
    first, second = keys.bias[1, 0].reshape(2, half)[:, -1]
    rotated = np.stack(
        [
            first * np.cos(radians) - second * np.sin(radians),
            second * np.cos(radians) + first * np.sin(radians),
        ]
    )
    offset = kv.scales.k_offset[1, 0].reshape(2, half)[:, -1]
    reach = np.abs(rotated - offset[:, None]).max() + 16 * keys.spread[1].max()
    assert reach <= 448 * kv.scales.k[1, 0, 0] <= 2 * max(reach, 448)


def test_a_large_k_bias_that_rotates_leaves_its_layer_unquantized_with_a_warning() -> None:
    params = with_bias(300.0, pair=0)
    with pytest.warns(
        UserWarning, match=r"Keys of layers 1 have a K bias .* use bfloat16\. kv_scales='unit'"
    ):
        kv = resolved(params)
    assert [spec.fmt.name for spec in kv.specs] == ["fp8_e4m3", "bfloat16"]
    assert [spec.fmt.name for spec in resolved(params, kv_scales="unit").specs] == ["fp8_e4m3"] * 2


def test_caches_that_are_not_fp8_and_shapes_ignore_the_weights() -> None:
    params = with_bias(300.0, pair=0)
    assert resolved(params, "bfloat16").name == "bfloat16"
    assert resolved(read_checkpoint_info(BIASED).abstract_params()).scales.k_offset is None
