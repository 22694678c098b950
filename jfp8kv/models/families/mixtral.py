"""Mixtral and gpt-oss: every layer's MLP is a mixture of experts."""

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    every,
    experts,
    layer_types,
    llama_like,
    sliding_window,
    uniform_windows,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import spelled

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def mixtral(d: Fields) -> ModelConfig:
    """Mixtral: two of eight experts, their weights summing to 1."""
    return llama_like(
        d,
        "MixtralForCausalLM",
        max_len=131072,
        theta=1e6,
        norm_eps=1e-5,
        kv_heads=8,
        windows=uniform_windows(d, sliding_window(d)),
        experts=experts(d, hidden_key="intermediate_size", count=8, top_k=2),
    )


def gpt_oss(d: Fields) -> ModelConfig:
    """gpt-oss: sinks, windows on every other layer from the first on, biases everywhere, experts with a clamped gate."""
    layers = f.count(d, "num_hidden_layers")
    kinds = layer_types(d, layers, every(2, layers))
    bias = f.flag(d, "attention_bias", True)
    return llama_like(
        d if spelled(d) else {**d, "rope_parameters": _GPT_OSS_ROPE},
        "GptOssForCausalLM",
        max_len=131072,
        theta=150000.0,
        norm_eps=1e-5,
        head_dim=64,
        kv_heads=8,
        layer_types=kinds,
        windows=windows(kinds, sliding_window(d, 128)),
        sinks=True,
        qkv_bias=bias,
        o_bias=bias,
        experts=experts(
            d,
            hidden_key="intermediate_size",
            count=128,
            top_k=4,
            bias=True,
            clamped=True,
            alpha=f.number(d, "swiglu_alpha", 1.702),
            limit=f.number(d, "swiglu_limit", 7.0),
        ),
    )
