"""`quantization_config`s of every tool become a `WeightScheme`; unsupported ones are refused."""

import pytest

from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.quantization import declared_kv_dtype, weight_scheme

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(*weights, **more):
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": w} for i, w in enumerate(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    } | more


@pytest.mark.parametrize(
    ("quantization", "blocks", "description"),
    [
        (compressed(FP8), ((0, 0),), "a scale per tensor"),
        (
            compressed(FP8 | {"strategy": "tensor"}, format="naive-quantized"),
            ((0, 0),),
            "a scale per tensor",
        ),
        (
            compressed(FP8 | {"strategy": "channel"}, sparsity_config={}),
            ((1, 0),),
            "a scale per channel",
        ),
        (
            compressed(FP8 | {"strategy": "group", "group_size": 64}),
            ((1, 64),),
            "a scale per group of 64",
        ),
        (
            compressed(FP8 | {"strategy": "block", "block_structure": [128, 64]}),
            ((128, 64),),
            "block of 128 x 64",
        ),
        (
            compressed(FP8 | {"strategy": "block", "block_structure": "128x64"}),
            ((128, 64),),
            "block of 128 x 64",
        ),
        (
            compressed(FP8, FP8 | {"strategy": "channel"}, FP8),
            ((0, 0), (1, 0)),
            "per tensor or channel",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ((0, 0),), "modelopt: FP8"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            ((1, 0),),
            "channel",
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            },
            ((0, 0),),
            "quark: FP8",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            ((0, 0),),
            "fp8: FP8, a scale per tensor",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            ((128, 128),),
            "block of 128 x 128",
        ),
        (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
            ((1, 0),),
            "fbgemm_fp8: FP8, a scale per channel",
        ),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": []},
            ((1, 32),),
            "mxfp4: MXFP4, a scale per group of 32",
        ),
    ],
)
def test_a_scheme_has_the_block_shapes_of_the_config(quantization, blocks, description):
    scheme = weight_scheme(quantization)
    assert scheme.blocks == blocks and description in str(scheme)


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        {},
        {"quant_method": "compressed-tensors", "kv_cache_scheme": FP8, "config_groups": {}},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {"quant_method": "modelopt", "quant_algo": "NO_QUANT"},
        {
            "quant_method": "quark",
            "kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}},
        },
    ],
)
def test_weights_that_are_not_quantized_have_no_scheme(quantization):
    assert weight_scheme(quantization) is None


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "None"),
        (compressed({"num_bits": 8, "type": "int"}, format="int-quantized"), "int-quantized"),
        (compressed({"num_bits": 4, "type": "int"}, format="pack-quantized"), "pack-quantized"),
        (
            compressed({"num_bits": 8, "type": "int"}, format="naive-quantized"),
            "8 bits and type 'int'",
        ),
        (
            compressed({"num_bits": 4, "type": "float"}, format="nvfp4-pack-quantized"),
            "nvfp4-pack-quantized",
        ),
        (compressed(FP8 | {"symmetric": False}), "type 'float'"),
        (compressed(FP8 | {"strategy": "tensor_group"}), "tensor_group"),
        (compressed(FP8, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        (
            {"quant_method": "modelopt", "config_groups": {"group_0": {"weights": FP8}}},
            "quant_algo None",
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group"}},
            },
            "int4",
        ),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    ],
)
def test_an_unsupported_scheme_is_refused_with_the_supported_ones(quantization, named):
    with pytest.raises(CheckpointError) as error:
        weight_scheme(quantization)
    assert all(
        part in str(error.value) for part in (named, "compressed-tensors", "fbgemm_fp8", "mxfp4")
    ), error.value


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "config_groups": ["a"]},
        compressed(FP8 | {"strategy": "group", "group_size": None}),
        compressed(FP8 | {"strategy": "block", "block_structure": [128]}),
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "modelopt", "quant_algo": ["FP8"]},
        {"quant_method": "quark", "global_quant_config": "fp8"},
    ],
)
def test_a_malformed_scheme_is_refused_by_name(quantization):
    with pytest.raises(CheckpointError, match="quantization_config=.*malformed"):
        weight_scheme(quantization)


@pytest.mark.parametrize(
    "more", [{"kv_cache_scheme": "static"}, {"kv_cache_quant_targets": ["k_proj", "v_proj"]}]
)
def test_autofp8_declares_an_fp8_cache_in_two_forms(more):
    assert (
        declared_kv_dtype({"quant_method": "fp8", "activation_scheme": "static"} | more)
        == "fp8_e4m3"
    )


def test_weights_and_cache_are_declared_independently():
    both = compressed(FP8, kv_cache_scheme=FP8)
    assert declared_kv_dtype(both) == "fp8_e4m3" and weight_scheme(both).blocks == ((0, 0),)
