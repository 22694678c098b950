"""The cache of a model without scales: scale 1, and the constant part of large keys kept out of it."""

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
        params, kv_dtype, kv_scales, page_size=16, max_tokens_per_dispatch=16, longest=LONGEST
    )


def with_bias(size: float, *, pair: int, layer: int = 1) -> jfp8kv.Params:
    """A model whose keys of one layer have `size` in the first of a pair of channels, in every head; pair -1 turns slowest."""
    params = load("llama_mha_bias")
    c, layers = params.config, dict(params.tree["layers"])
    bias = np.array(layers["k"]["bias"]).reshape(c.layers, c.kv_heads, 2, c.head_dim // 2)
    bias[layer, :, 0, pair] = size
    layers["k"] = layers["k"] | {"bias": jnp.asarray(bias.reshape(c.layers, -1))}
    slow = dataclasses.replace(
        c.ropes[0], theta=1e6
    )  # as Qwen2's: the last pair keeps its place over any text here
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


def test_the_constant_part_is_the_bias_and_what_the_norms_bias_becomes() -> None:
    """GPT-2's LayerNorm has a bias of its own, which the projection turns into more of the same."""
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
def test_a_large_constant_costs_nothing_where_scale_1_loses_the_keys(size, kv_dtype) -> None:
    """Beyond 448, too, where E4M3 would clip. The error is compared with that of the same model without the bias."""
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


def test_only_layers_that_need_it_have_an_offset_and_no_layer_takes_more_bytes() -> None:
    params = with_bias(300.0, pair=-1)
    kv, unit = resolved(params), resolved(params, kv_scales="unit")
    assert np.flatnonzero(kv.scales.k_offset.any(axis=(1, 2))).tolist() == [1]
    assert (
        np.all(kv.scales.k[0] == 1) and kv.page_bytes == unit.page_bytes and kv.specs == unit.specs
    )


def test_scales_reach_what_is_left_of_a_constant_that_turns_a_little() -> None:
    """A pair that turns by less than a radian over the longest text: no key is farther from the offset than the scale holds."""
    params = with_bias(3000.0, pair=-1)
    kv = resolved(params)
    keys = KeyStats.from_weights(params.tree, params.config)
    positions = np.arange(LONGEST)
    half = params.config.head_dim // 2
    radians = positions * 1e6 ** -((half - 1) / half)
    first, second = keys.bias[1, 0].reshape(2, half)[:, -1]
    turned = np.stack(
        [
            first * np.cos(radians) - second * np.sin(radians),
            second * np.cos(radians) + first * np.sin(radians),
        ]
    )
    offset = kv.scales.k_offset[1, 0].reshape(2, half)[:, -1]
    reach = np.abs(turned - offset[:, None]).max() + 16 * keys.spread[1].max()
    assert reach <= 448 * kv.scales.k[1, 0, 0] <= 2 * max(reach, 448)


def test_a_large_constant_that_turns_leaves_its_layer_unquantized_aloud() -> None:
    params = with_bias(300.0, pair=0)
    with pytest.warns(
        UserWarning, match=r"Keys of layers 1 have a K bias .* use bfloat16\. kv_scales='unit'"
    ):
        kv = resolved(params)
    assert [kind.fmt.name for kind in kv.specs] == ["fp8_e4m3", "bfloat16"]
    assert [kind.fmt.name for kind in resolved(params, kv_scales="unit").specs] == ["fp8_e4m3"] * 2


def test_a_cache_that_is_not_fp8_and_shapes_without_weights_ask_nothing_of_the_weights() -> None:
    params = with_bias(300.0, pair=0)
    assert resolved(params, "bfloat16").name == "bfloat16"
    assert resolved(read_checkpoint_info(BIASED).abstract_params()).scales.k_offset is None
