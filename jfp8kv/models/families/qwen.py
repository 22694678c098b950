"""Qwen: 2 and 2.5 (biases on q, k, v), 3 (norms on the heads of q and k), and their MoE models."""

from dataclasses import replace

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    llama_like,
    read_experts,
    read_layer_types,
    sliding_window,
    uniform_windows,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import FULL, SLIDING


def _window(d: Fields) -> int | None:
    return sliding_window(d, 4096) if f.flag(d, "use_sliding_window") else None


def _layer_types(d: Fields) -> list[str]:
    """Return the layer types: by default, windows begin at layer `max_window_layers`."""
    layers = f.count(d, "num_hidden_layers")
    first = f.count(d, "max_window_layers", 28, minimum=0)
    window = _window(d)
    by_default = [SLIDING if window and layer >= first else FULL for layer in range(layers)]
    return read_layer_types(d, layers, by_default)


def qwen2(d: Fields) -> ModelConfig:
    """Return the config of a Qwen2 or Qwen2.5."""
    types = _layer_types(d)
    config = llama_like(d, "Qwen2ForCausalLM", max_len=32768, layer_types=types)
    return replace(config, qkv_bias=True, windows=windows(types, _window(d)))


def qwen3(d: Fields) -> ModelConfig:
    """Return the config of a Qwen3."""
    types = _layer_types(d)
    bias = f.flag(d, "attention_bias")
    config = llama_like(d, "Qwen3ForCausalLM", max_len=32768, head_dim=128, layer_types=types)
    return replace(
        config, windows=windows(types, _window(d)), qk_norm="head", qkv_bias=bias, o_bias=bias
    )


def qwen3_moe(d: Fields) -> ModelConfig:
    """Return the config of a Qwen3-MoE: experts without biases; windows are on every layer."""
    bias = f.flag(d, "attention_bias")
    experts = read_experts(d, hidden_key="moe_intermediate_size", count=128, top_k=8, hidden=768)
    normalized = f.flag(d, "norm_topk_prob")
    return replace(
        llama_like(d, "Qwen3MoeForCausalLM", max_len=32768, kv_heads=4),
        windows=uniform_windows(d, _window(d)),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        experts=experts and replace(experts, normalized=normalized),
    )


def qwen2_moe(d: Fields) -> ModelConfig:
    """Return the config of a Qwen1.5-MoE or Qwen2-MoE: experts, and a gated shared expert.

    Windows alternate on the layers before `max_window_layers`.
    """
    layers = f.count(d, "num_hidden_layers")
    limit = f.count(d, "max_window_layers", 28, minimum=0)
    window = _window(d)
    by_default = [
        SLIDING if window and layer < limit and layer % 2 == 0 else FULL for layer in range(layers)
    ]
    types = read_layer_types(d, layers, by_default)
    experts = read_experts(d, hidden_key="moe_intermediate_size", count=60, top_k=4, hidden=1408)
    normalized = f.flag(d, "norm_topk_prob")
    shared_hidden = f.count(d, "shared_expert_intermediate_size", 5632)
    return replace(
        llama_like(d, "Qwen2MoeForCausalLM", max_len=32768, layer_types=types),
        windows=windows(types, window),
        qkv_bias=f.flag(d, "qkv_bias", True),
        experts=experts and replace(experts, normalized=normalized, shared_hidden=shared_hidden),
    )
