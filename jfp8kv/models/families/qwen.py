"""Qwen: 2 and 2.5 (biases on q, k, v), 3 (norms on each head's queries and keys), and their mixtures of experts."""

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    experts,
    layer_types,
    llama_like,
    sliding_window,
    uniform_windows,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import FULL, SLIDING


def _window(d: Fields) -> int | None:
    return sliding_window(d, 4096) if f.flag(d, "use_sliding_window") else None


def _kinds(d: Fields) -> list[str]:
    """Windows on the layers from `max_window_layers` on, where windows are used at all."""
    layers, full = f.count(d, "num_hidden_layers"), f.count(d, "max_window_layers", 28, least=0)
    return layer_types(
        d, layers, [SLIDING if _window(d) and i >= full else FULL for i in range(layers)]
    )


def qwen2(d: Fields) -> ModelConfig:
    """Qwen2 and Qwen2.5."""
    kinds = _kinds(d)
    return llama_like(
        d,
        "Qwen2ForCausalLM",
        max_len=32768,
        qkv_bias=True,
        layer_types=kinds,
        windows=windows(kinds, _window(d)),
    )


def qwen3(d: Fields) -> ModelConfig:
    """Qwen3."""
    kinds, bias = _kinds(d), f.flag(d, "attention_bias")
    return llama_like(
        d,
        "Qwen3ForCausalLM",
        max_len=32768,
        head_dim=128,
        layer_types=kinds,
        windows=windows(kinds, _window(d)),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )


def qwen3_moe(d: Fields) -> ModelConfig:
    """Qwen3-MoE: experts without biases; the window, if any, is on every layer."""
    bias = f.flag(d, "attention_bias")
    return llama_like(
        d,
        "Qwen3MoeForCausalLM",
        max_len=32768,
        kv_heads=4,
        windows=uniform_windows(d, _window(d)),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        experts=experts(
            d,
            hidden_key="moe_intermediate_size",
            count=128,
            top_k=8,
            hidden=768,
            normalized=f.flag(d, "norm_topk_prob"),
        ),
    )


def qwen2_moe(d: Fields) -> ModelConfig:
    """Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a gate; windows alternate on the layers before `max_window_layers`."""
    layers, limit, window = (
        f.count(d, "num_hidden_layers"),
        f.count(d, "max_window_layers", 28, least=0),
        _window(d),
    )
    default = [SLIDING if window and i < limit and i % 2 == 0 else FULL for i in range(layers)]
    kinds = layer_types(d, layers, default)
    return llama_like(
        d,
        "Qwen2MoeForCausalLM",
        max_len=32768,
        layer_types=kinds,
        windows=windows(kinds, window),
        qkv_bias=f.flag(d, "qkv_bias", True),
        experts=experts(
            d,
            hidden_key="moe_intermediate_size",
            count=60,
            top_k=4,
            hidden=1408,
            normalized=f.flag(d, "norm_topk_prob"),
            shared_hidden=f.count(d, "shared_expert_intermediate_size", 5632),
        ),
    )
