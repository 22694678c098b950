"""Formats by layer: the engine agrees with an oracle that rounds each layer."""

import dataclasses

import numpy as np
import pytest

import jfp8kv
from jfp8kv.cache.config import layer_formats, resolve_cache
from jfp8kv.cache.plan import KVPlan, LayerPlan
from jfp8kv.core.errors import CheckpointError, ConfigError
from tests.models.test_decoder import ENGINE, REFERENCES, rms
from tests.references import oracle

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_gqa"
WINDOWS = REFERENCES[0].parent / "gemma3_new"
# As in tests/models/test_decoder.py: a value may round to the other neighbor.
ROUNDING = 5e-3


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER, dtype="float32")


def tokens() -> np.ndarray:
    return np.load(FOLDER / "reference.npz")["tokens"]


def scales(offset: bool = False) -> jfp8kv.KVScales:
    rng = np.random.default_rng(4)
    k, v = rng.uniform(0.002, 0.05, (2, 2, 2, 1))
    return jfp8kv.KVScales(
        k, v, rng.normal(size=(2, 2, 16)) if offset else None, kv_dtype="fp8_e4m3"
    )


def expected(*stores) -> np.ndarray:
    """Return logits of the oracle with one store per layer; None does not round."""

    def store(x, layer, which):
        return x if stores[layer] is None else stores[layer](x, layer, which)

    return oracle.forward(FOLDER, tokens(), store)


STORES = {
    "float32": None,
    "fp8_e4m3": oracle.fp8_store("e4m3"),
    "fp8_e5m2": oracle.fp8_store("e5m2"),
}


@pytest.mark.parametrize(
    "kv_dtype", [["fp8_e4m3", "float32"], ["float32", "fp8_e4m3"], ["fp8_e4m3", "fp8_e5m2"]]
)
def test_each_layer_rounds_to_its_format(params, kv_dtype) -> None:
    llm = jfp8kv.LLM(params, kv_dtype=kv_dtype, **ENGINE)
    want = expected(*(STORES[name] for name in kv_dtype))
    assert rms(llm.logits(tokens()), want) <= ROUNDING
    assert rms(expected(STORES["fp8_e4m3"], STORES["fp8_e4m3"]), want) > 5 * ROUNDING, (
        "the difference must be visible"
    )


def test_skipped_layers_use_bfloat16_and_need_no_scales(params) -> None:
    given = scales()
    skipping = {"default": "fp8_e4m3", "skip": [-1]}
    got = jfp8kv.logits(params, tokens(), kv_dtype=skipping, kv_scales=given)
    want = expected(oracle.fp8_store("e4m3", given.k, given.v), None)
    assert rms(got, want) <= ROUNDING + 2**-8, (
        "the layer in bfloat16 adds a rounding of 2**-9 to each value"
    )
    assert jfp8kv.LLM(params, kv_dtype=skipping, **ENGINE).kv_dtype == "fp8_e4m3 x1, bfloat16 x1"


def test_a_list_of_one_format_equals_that_format(params) -> None:
    one = jfp8kv.logits(params, tokens(), kv_dtype="fp8_e4m3")
    assert np.array_equal(jfp8kv.logits(params, tokens(), kv_dtype=["fp8", "fp8_e4m3"]), one)


def test_a_plan_applies_its_layers_and_scales_and_survives_a_file(params, tmp_path) -> None:
    given_scales = scales(offset=True)
    layers = (
        LayerPlan("fp8_e4m3", "token_head", k_offset=True),
        LayerPlan("fp8_e5m2", "head", loss=0.25),
    )
    plan = KVPlan(layers, given_scales, bytes_per_token=72.0, loss=0.5)
    plan.save(tmp_path / "plan.safetensors")
    again = KVPlan.load(tmp_path / "plan.safetensors")
    assert (again.layers, again.bytes_per_token, again.loss) == (plan.layers, 72.0, 0.5)
    assert again.scales.arrays.keys() == {"k", "v", "k_offset"}

    def dynamic(x, layer, which):
        c = given_scales.k_offset[layer] if which == "k" else 0.0
        return oracle.fp8_store("e4m3", dynamic=True)(x - c, layer, which) + c

    def static(x, layer, which):
        c = given_scales.k_offset[layer] if which == "k" else 0.0
        return oracle.fp8_store("e5m2", given_scales.k, given_scales.v)(x - c, layer, which) + c

    want = expected(dynamic, static)
    for given in (plan, again, tmp_path / "plan.safetensors", str(tmp_path / "plan.safetensors")):
        assert rms(jfp8kv.logits(params, tokens(), kv_dtype=given), want) <= ROUNDING
    assert "layers 0: fp8_e4m3, token_head scales, K offset" in str(plan)


def test_chunked_prefill_gives_the_same_tokens_with_mixed_formats(params) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, 200, n).tolist() for n in (50, 9, 33)]
    kv = {"kv_dtype": ["bfloat16", "fp8_e4m3"], "kv_scales": "token_head"}
    outputs = []
    for budget in (64, 16):
        llm = jfp8kv.LLM(params, **ENGINE | {"max_num_batched_tokens": budget} | kv)
        outputs.append(
            [
                out.token_ids
                for out in llm.generate(prompts, max_tokens=8, temperature=0.0, ignore_eos=True)
            ]
        )
    assert outputs[0] == outputs[1]


def test_bytes_per_token_are_the_sum_over_layers(params) -> None:
    c = params.config
    llm = jfp8kv.LLM(params, kv_dtype=["bfloat16", "fp8_e4m3"], kv_scales="token_head", **ENGINE)
    assert llm.stats.kv_bytes_per_token == 2 * c.kv_heads * (2 * c.head_dim + (c.head_dim + 1))


def test_layers_are_skipped_by_number_from_either_end_and_by_type() -> None:
    config = jfp8kv.load(WINDOWS).config
    assert config.windows == (8, 8, 0, 8)

    def names(**given) -> list[str]:
        return [fmt.name for fmt in layer_formats({"default": "fp8"} | given, config, "float32")]

    assert names(skip=["sliding_window"]) == ["bfloat16", "bfloat16", "fp8_e4m3", "bfloat16"]
    assert names(skip=["full_attention", 0]) == ["bfloat16", "fp8_e4m3", "bfloat16", "fp8_e4m3"]
    assert names(skip=[-1], skip_dtype="auto") == ["fp8_e4m3"] * 3 + ["float32"]
    assert names() == ["fp8_e4m3"] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"defaults": "fp8"}, "'defaults'.*Did you mean 'default'"),
        ({"skip": [2]}, "skips layer 2: this model's layers are 0 to 1"),
        ({"skip": [True]}, "skips layer True"),
        ({"skip": ["sliding"]}, "Did you mean 'sliding_window'"),
        ({"skip": 0}, "must be a list of layers"),
        ({"default": "fp9"}, "fp9"),
        (["fp8"], "lists 1 layers, and this model has 2"),
        (["fp8", "float"], "'float'"),
        (7, "a name for all layers"),
        (
            KVPlan((LayerPlan("fp8_e4m3"),), jfp8kv.KVScales.unit(1), 1.0),
            "plan for 1 layers, and this model has 2",
        ),
    ],
)
def test_an_invalid_kv_dtype_is_refused(params, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        jfp8kv.LLM(params, kv_dtype=given, **ENGINE)


def test_a_plan_excludes_other_scales_and_a_file_must_contain_one(params, tmp_path) -> None:
    plan = KVPlan((LayerPlan("fp8_e4m3", "unit"),) * 2, jfp8kv.KVScales.unit(2), 64.0)
    with pytest.raises(ConfigError, match="leave kv_scales out"):
        jfp8kv.logits(params, [1, 2], kv_dtype=plan, kv_scales="unit")
    scales().save(tmp_path / "scales.safetensors")
    with pytest.raises(CheckpointError, match="a jfp8kv.KVScales file, not a jfp8kv.KVPlan"):
        jfp8kv.logits(params, [1, 2], kv_dtype=tmp_path / "scales.safetensors")


def test_scales_for_another_format_are_converted_with_a_warning(params) -> None:
    given_scales = scales()
    with pytest.warns(UserWarning, match="computed for fp8_e4m3: for fp8_e5m2 they are"):
        got = jfp8kv.logits(
            params, tokens(), kv_dtype=["float32", "fp8_e5m2"], kv_scales=given_scales
        )
    ratio = 448 / 57344
    assert (
        rms(
            got,
            expected(
                None, oracle.fp8_store("e5m2", given_scales.k * ratio, given_scales.v * ratio)
            ),
        )
        <= ROUNDING
    )


def test_the_layout_of_keys_follows_the_config_and_takes_the_same_bytes(params) -> None:
    transposed = resolve_cache(
        params, ["fp8_e4m3", "float32"], "unit", page_size=32, max_tokens_per_dispatch=16
    )
    untransposed = dataclasses.replace(transposed, keys_transposed=False)
    assert transposed.new_pool(2).k_bits.shape == (10, 2, 16, 32)
    assert (
        untransposed.new_pool(2).k_bits.shape
        == untransposed.new_pool(2).v_bits.shape
        == (10, 2, 32, 16)
    )
    assert transposed.page_bytes == untransposed.page_bytes
