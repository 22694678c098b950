"""Gemma 1, 2 and 3 (text): norms that multiply by 1 + weight, scaled embeddings, soft caps, alternating windows."""

import dataclasses
from typing import Any

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import every, layer_types, llama_like, sliding_window, windows
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import FULL, SLIDING, distinct, rope


def _gemma(d: Fields, architecture: str, **rest: Any) -> ModelConfig:
    f.refuse(
        d,
        "use_bidirectional_attention",
        False,
        why="attention to later tokens is not supported in a decoder",
    )
    bias = f.flag(d, "attention_bias")
    return llama_like(
        d,
        architecture,
        **{
            "max_len": 8192,
            "head_dim": 256,
            "tied": True,
            "norm": "rms_plus_one",
            "embedding_scale": f.count(d, "hidden_size") ** 0.5,
            "qkv_bias": bias,
            "o_bias": bias,
            "activation": "gelu_pytorch_tanh",
        }
        | rest,
    )


def gemma(d: Fields) -> ModelConfig:
    """Gemma 1. Its early configs say "gelu" and mean the tanh approximation."""
    name = d.get("hidden_act")
    return _gemma(
        {**d, "hidden_act": "gelu_pytorch_tanh" if name == "gelu" else name},
        "GemmaForCausalLM",
        kv_heads=16,
    )


def _from_gemma2(d: Fields, architecture: str, kinds: list[str], **rest: Any) -> ModelConfig:
    """What Gemma 2 brought and 3 kept: norms on both sides, a scale of its own for queries, windows on some layers."""
    return _gemma(
        d,
        architecture,
        activation_key="hidden_activation",
        kv_heads=4,
        post_norm=True,
        sm_scale=f.number(d, "query_pre_attn_scalar", 256.0) ** -0.5,
        windows=windows(kinds, sliding_window(d, 4096)),
        **rest,
    )


def gemma2(d: Fields) -> ModelConfig:
    """Gemma 2: windows on every other layer, the first one included; soft caps on scores and logits."""
    layers = f.count(d, "num_hidden_layers")
    kinds = layer_types(d, layers, every(2, layers))
    return _from_gemma2(
        d,
        "Gemma2ForCausalLM",
        kinds,
        layer_types=kinds,
        softcap=f.optional_number(d, "attn_logit_softcapping", 50.0),
        logit_softcap=f.optional_number(d, "final_logit_softcapping", 30.0),
    )


def gemma3(d: Fields) -> ModelConfig:
    """Gemma 3's text model: five layers with a window and a rope of their own to one that sees all.

    Its configs carry `attn_logit_softcapping` from Gemma 2; no implementation applies it.
    """
    layers = f.count(d, "num_hidden_layers")
    kinds = layer_types(d, layers, every(f.count(d, "sliding_window_pattern", 6), layers))
    head_dim, max_len = f.count(d, "head_dim", 256), f.count(d, "max_position_embeddings", 131072)
    # The old spelling: `rope_theta` and `rope_scaling` are of the layers that see all, `rope_local_base_freq` of the others.
    given = f.mapping(d, "rope_parameters")
    full = (
        {"rope_theta": d.get("rope_theta")} | f.mapping(given, FULL) | f.mapping(d, "rope_scaling")
    )
    sliding = {"rope_theta": d.get("rope_local_base_freq")} | f.mapping(given, SLIDING)
    ropes = {
        FULL: rope(full, head_dim=head_dim, max_len=max_len, theta=1e6),
        SLIDING: rope(sliding, head_dim=head_dim, max_len=max_len, theta=1e4),
    }
    every_rope, layer_ropes = distinct([ropes[kind] for kind in kinds])
    config = _from_gemma2(
        d,
        "Gemma3ForCausalLM",
        kinds,
        max_len=max_len,
        qk_norm="head",
        ropes=every_rope,
        layer_ropes=layer_ropes,
        logit_softcap=f.optional_number(d, "final_logit_softcapping"),
    )
    return dataclasses.replace(config, max_len=max_len)  # counts its rope's scaling already


def gemma3_with_vision(d: Fields) -> ModelConfig:
    """The text model inside a Gemma 3 that also sees; its `text_config` lists only what differs from the family's defaults."""
    text = {**f.mapping(d, "text_config")}
    for key in (
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "quantization_config",
        "tie_word_embeddings",
    ):
        if d.get(key) is not None:
            text.setdefault(key, d[key])
    defaults = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return gemma3(defaults | text)
