"""Mixtral and gpt-oss: the MLP of every layer is a mixture of experts."""

from dataclasses import replace

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    alternating,
    llama_like,
    read_experts,
    read_layer_types,
    sliding_window,
    uniform_windows,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import rope_entries

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def mixtral(d: Fields) -> ModelConfig:
    """Return the config of a Mixtral: two of eight experts per token, with normalized weights."""
    config = llama_like(
        d, "MixtralForCausalLM", max_len=131072, theta=1e6, norm_eps=1e-5, kv_heads=8
    )
    return replace(
        config,
        windows=uniform_windows(d, sliding_window(d)),
        experts=read_experts(d, hidden_key="intermediate_size", count=8, top_k=2),
    )


def gpt_oss(d: Fields) -> ModelConfig:
    """Return the config of a gpt-oss: sinks, biases, and experts with a clamped gate.

    Windows alternate, beginning with the first layer.
    """
    layers = f.count(d, "num_hidden_layers")
    types = read_layer_types(d, layers, alternating(2, layers))
    bias = f.flag(d, "attention_bias", True)
    config = llama_like(
        d if rope_entries(d) else {**d, "rope_parameters": _GPT_OSS_ROPE},
        "GptOssForCausalLM",
        max_len=131072,
        theta=150000.0,
        norm_eps=1e-5,
        head_dim=64,
        kv_heads=8,
        layer_types=types,
    )
    experts = read_experts(d, hidden_key="intermediate_size", count=128, top_k=4)
    alpha = f.number(d, "swiglu_alpha", 1.702)
    limit = f.number(d, "swiglu_limit", 7.0)
    if experts is not None:
        experts = replace(experts, bias=True, clamped=True, alpha=alpha, limit=limit)
    return replace(
        config,
        windows=windows(types, sliding_window(d, 128)),
        sinks=True,
        qkv_bias=bias,
        o_bias=bias,
        experts=experts,
    )
