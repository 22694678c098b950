"""Configs in every spelling become a `ModelConfig`; unsupported settings are refused by name."""

import warnings

import numpy as np
import pytest

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import RopeConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.families.gguf import config_from_gguf, llama3_scaling
from jfp8kv.models.names import expected_shapes
from jfp8kv.models.quantization import declared_kv_dtype

pytestmark = pytest.mark.quick_compile

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_old_and_new_spellings_give_the_same_config(tiny):
    old = tiny.config(
        rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA31}, torch_dtype="bfloat16"
    )
    new = tiny.config(rope_theta=None, torch_dtype=None, dtype="bfloat16")
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA31}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(new).ropes[0] == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    assert config_from_hf(new).dtype == "bfloat16"


def test_missing_and_null_entries_get_their_defaults(tiny):
    config = config_from_hf(
        tiny.config(num_key_value_heads=None, head_dim=None)
        | {"head_dim": None, "rope_scaling": None}
    )
    assert (config.kv_heads, config.head_dim) == (4, 8)
    assert config.ropes[0] == RopeConfig()
    assert not config.tied_embeddings


@pytest.mark.parametrize(("given", "expected"), [(2, (2,)), ([2, 7, 2], (2, 7)), (None, ())])
def test_eos_ids_may_be_one_several_or_none(tiny, given, expected):
    assert config_from_hf(tiny.config(eos_token_id=given)).eos_ids == expected


def test_linear_rope_scaling_under_its_oldest_name(tiny):
    config = config_from_hf(tiny.config(rope_scaling={"type": "linear", "factor": 2}))
    assert config.ropes[0] == RopeConfig(kind="linear", factor=2.0)


def test_attention_bias_is_on_all_four_projections(tiny):
    shapes = expected_shapes(config_from_hf(tiny.config(attention_bias=True, mlp_bias=True)))
    assert shapes["layers.q.bias"] == (2, 64)
    assert shapes["layers.k.bias"] == shapes["layers.v.bias"] == (2, 32)
    assert shapes["layers.o.bias"] == shapes["layers.down.bias"] == (2, 32)
    assert shapes["layers.gate.bias"] == shapes["layers.up.bias"] == (2, 64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"architectures": ["LlamaForCausalLn"]},
            ["LlamaForCausalLn", "Did you mean 'LlamaForCausalLM'"],
        ),
        ({"architectures": None, "model_type": "mamba"}, ["mamba", "LlamaForCausalLM"]),
        ({"hidden_act": "xielu"}, ["xielu", "silu"]),
        (
            {"rope_scaling": {"rope_type": "spiral", "factor": 4.0}},
            ["spiral", "default, linear, dynamic, llama3"],
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor=None", "'linear'", "positive"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "llama3"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor=1.5"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"head_dim": 5}, ["head_dim=5", "even"]),
        ({"torch_dtype": "int8"}, ["int8", "bfloat16"]),
    ],
)
def test_unsupported_settings_are_refused_with_the_supported_ones(tiny, change, named):
    with pytest.raises(ConfigError) as error:
        config_from_hf(tiny.config(**change))
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", {"LlamaForCausalLM": 1}),
        ("rms_norm_eps", None),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", "10000"),
        ("rope_theta", [1e4]),
        ("bos_token_id", [1]),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [[2]]),
        ("eos_token_id", {"2": 2}),
        ("eos_token_id", True),
        ("rope_scaling", "linear"),
        ("rope_parameters", [1.0]),
        ("quantization_config", "fp8"),
        ("hidden_act", ["silu"]),
        ("hidden_act", 3),
        ("hidden_size", "32"),
        ("torch_dtype", ["float32"]),
    ],
)
def test_a_malformed_entry_is_refused_with_its_value(tiny, key, value):
    named = key.removeprefix("torch_").removesuffix("s")
    with pytest.raises(ConfigError) as error:
        config_from_hf(tiny.config() | {key: value})
    assert named in str(error.value) and str(value) in str(error.value), error.value


def test_the_architecture_may_be_a_string(tiny):
    assert config_from_hf(tiny.config(architectures="LlamaForCausalLM")) == config_from_hf(
        tiny.config()
    )


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "compressed-tensors", "kv_cache_scheme": FP8, "config_groups": {}},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {
            "quant_method": "quark",
            "kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}},
        },
    ],
)
def test_a_checkpoint_that_quantizes_only_its_cache_declares_fp8(tiny, scheme):
    assert config_from_hf(tiny.config(quantization_config=scheme)).kv_cache_dtype == "fp8_e4m3"


def test_an_unknown_cache_scheme_is_ignored_with_a_warning(tiny):
    scheme = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "NVFP4"}
    with pytest.warns(UserWarning, match="NVFP4"):
        assert config_from_hf(tiny.config(quantization_config=scheme)).kv_cache_dtype is None


def test_without_a_cache_scheme_there_is_no_warning(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_hf(tiny.config(quantization_config={})).kv_cache_dtype is None


def llama3_divisors(factor, theta, head_dim):
    """Llama 3.1's published rule, one frequency at a time."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_gguf_divisors(factor):
    rule = llama3_scaling(llama3_divisors(factor, 5e5, 128), 5e5)
    assert rule == {"rope_type": "llama3", **LLAMA31, "factor": factor}


def test_rope_divisors_of_another_rule_are_refused():
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        llama3_scaling(np.linspace(1.0, 8.0, 64), 5e5)


GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.vocab_size": 40,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"general.architecture": "gptneox"}, ["gptneox", "llama"]),
        ({"llama.expert_count": 8}, ["expert_count=8"]),
        ({"llama.rope.dimension_count": 4}, ["dimension_count=4", "8"]),
        (
            {"llama.rope.scaling.type": "spiral", "llama.rope.scaling.factor": 4.0},
            ["spiral", "llama3"],
        ),
        ({"llama.attention.value_length": 4}, ["value_length=4", "8"]),
        ({"general.architecture": ["llama"]}, ["['llama']"]),
        ({"general.architecture": "gemma2"}, ["'gemma2'", "llama, qwen2, qwen3, gemma3"]),
        ({"general.architecture": "qwen3moe"}, ["'qwen3moe'", "llama, qwen2, qwen3, gemma3"]),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
            ["yarn_ext_factor=0.5", "1.0"],
        ),
        ({"llama.attention.head_count": [4, 4]}, ["num_attention_heads=[4, 4]"]),
        ({"llama.rope.freq_base": "1e4"}, ["freq_base='1e4'", "positive number"]),
        ({"llama.rope.scale_linear": "two"}, ["factor='two'", "positive number"]),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, ["tokenizer.ggml.eos_token_id='</s>'"]),
    ],
)
def test_unsupported_gguf_metadata_is_refused_by_name(change, named):
    with pytest.raises(ConfigError) as error:
        config_from_gguf(GGUF | change, tensors={"output.weight": (40, 32)})
    assert all(part in str(error.value) for part in named), error.value


def test_gguf_metadata_gives_rope_biases_tied_embeddings_and_eos_ids():
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5}
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = config_from_gguf(
        GGUF | ends | scaling, tensors={"token_embd.weight": (40, 32), "blk.0.attn_q.bias": (32,)}
    )
    assert config.ropes[0] == RopeConfig(kind="linear", factor=2.0)
    assert config.eos_ids == (2, 5)
    assert config.tied_embeddings and config.qkv_bias and not config.o_bias and not config.mlp_bias


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (
            {"factor": 4.0},
            RopeConfig(kind="linear", factor=4.0),
        ),  # a scaling without a type is linear
        ({"type": "none", "factor": 4.0}, RopeConfig()),
        ({"type": "linear", "factor": 0.0}, RopeConfig()),
    ],
)
def test_gguf_rope_scaling_follows_llama_cpp(scaling, expected):
    config = config_from_gguf(
        GGUF | {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}, tensors={}
    )
    assert config.ropes == (expected,)


def gemma3(**more):
    own = {
        "attention.sliding_window": 24,
        "attention.key_length": 16,
        "rope.freq_base": 1e6,
        "block_count": 8,
    } | more
    metadata = {
        f"gemma3.{key.removeprefix('llama.')}": value
        for key, value in GGUF.items()
        if key.startswith("llama.")
    }
    metadata |= {f"gemma3.{key}": value for key, value in own.items()}
    return config_from_gguf(metadata | {"general.architecture": "gemma3"}, tensors={})


def test_gemma3_gguf_has_default_or_listed_windows_and_ropes():
    usual = gemma3()
    assert usual.windows == (24, 24, 24, 24, 24, 0, 24, 24) and usual.layer_ropes == (
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
    )
    assert [rope.theta for rope in usual.ropes] == [1e4, 1e6]
    assert gemma3(**{"rope.freq_base_swa": 2e4}).ropes[0].theta == 2e4
    assert gemma3(**{"attention.sliding_window_pattern": 2}).windows == (24, 0) * 4
    assert (
        gemma3(**{"attention.sliding_window_pattern": [True, False, False, True] * 2}).windows
        == (24, 0, 0, 24) * 2
    )
    for none in (0, None):
        config = gemma3(**{"attention.sliding_window": none})
        assert config.windows == () and [rope.theta for rope in config.ropes] == [1e6]


def test_gemma3_gguf_max_length_includes_the_rope_scaling():
    assert gemma3(**{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}).max_len == 128


@pytest.mark.parametrize(
    ("arch", "tokens", "expected"),
    [
        ("qwen2", ["a", "b", "<|im_end|>", "<|endoftext|>"], (2, 3)),
        ("gemma3", ["<pad>", "<eos>", "<bos>", "<end_of_turn>"], (2, 3, 1)),
        ("llama", ["<|eot_id|>", "a", "</s>", "<|im_end|>"], (2, 0, 3)),
        ("llama", ["<|im_end|>", "<|eom_id|>", "</s>", "<EOT>"], (2, 0, 1, 3)),
        ("qwen3", ["a", "<|end|>", "</s>", "<|endoftext|>"], (2, 1, 3)),
        ("llama", ["<|end|>", "<|return|>", "a", "b"], (2, 1)),  # harmony: <|end|> ends a message
    ],
)
def test_gguf_eos_ids_include_tokens_known_by_their_text(arch, tokens, expected):
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in GGUF.items()} | {
        "general.architecture": arch
    }
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 2}
    assert config_from_gguf(metadata, tensors={}).eos_ids == expected


def test_gguf_key_length_and_kv_heads_have_defaults():
    metadata = {
        key.replace("llama.", "qwen3."): value
        for key, value in GGUF.items()
        if not key.endswith("head_count_kv")
    }
    config = config_from_gguf(metadata | {"general.architecture": "qwen3"}, tensors={})
    assert (config.kv_heads, config.head_dim) == (4, 8)


@pytest.mark.parametrize("entry", [{"kv_cache_scheme": "fp8"}, {"kv_cache_quant_config": "fp8"}])
def test_a_malformed_quantization_config_is_refused(entry) -> None:
    with pytest.raises(CheckpointError, match="quantization_config=.*malformed"):
        declared_kv_dtype({"quant_method": "compressed-tensors"} | entry)
