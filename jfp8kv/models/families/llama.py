"""Families with Llama's layers: Llama, Mistral, SmolLM3, Phi-3, OLMo2, Granite."""

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    layer_types,
    llama_like,
    sliding_window,
    uniform_windows,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import FULL, SLIDING, distinct, rope, ropes, spelled


def llama(d: Fields) -> ModelConfig:
    """Llama 1 to 3 and what has their shape, such as SmolLM2 and TinyLlama. One bias switch covers q, k, v and o."""
    bias = f.flag(d, "attention_bias")
    return llama_like(
        d, "LlamaForCausalLM", qkv_bias=bias, o_bias=bias, mlp_bias=f.flag(d, "mlp_bias")
    )


def mistral(d: Fields) -> ModelConfig:
    """Mistral: a sliding window on every layer, unless the config says null."""
    window = sliding_window(d, 4096)
    return llama_like(
        d, "MistralForCausalLM", max_len=131072, kv_heads=8, windows=uniform_windows(d, window)
    )


def smollm3(d: Fields) -> ModelConfig:
    """SmolLM3: some layers rotate nothing, every fourth unless `no_rope_layers` (1 rotates, 0 does not) says which."""
    layers = f.count(d, "num_hidden_layers")
    step = f.count(d, "no_rope_layer_interval", 4)
    rotates = f.by_layer(d, "no_rope_layers", layers) or [
        (layer + 1) % step != 0 for layer in range(layers)
    ]
    window, slides = sliding_window(d), f.flag(d, "use_sliding_window")
    kinds = layer_types(
        d, layers, [SLIDING if slides and window and not rotated else FULL for rotated in rotates]
    )
    head_dim = f.count(
        d, "head_dim", f.count(d, "hidden_size") // f.count(d, "num_attention_heads")
    )
    max_len = f.count(d, "max_position_embeddings", 32768)
    found, which = ropes(d, kinds, head_dim=head_dim, max_len=max_len, theta=2e6)
    each = [
        found[which[layer] if which else 0] if rotates[layer] else None for layer in range(layers)
    ]
    every_rope, layer_ropes = distinct(each)
    bias = f.flag(d, "attention_bias")
    return llama_like(
        d,
        "SmolLM3ForCausalLM",
        max_len=max_len,
        tied=True,
        kv_heads=4,
        ropes=every_rope,
        layer_ropes=layer_ropes,
        windows=windows(kinds, window),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag(d, "mlp_bias"),
    )


def phi3(d: Fields) -> ModelConfig:
    """Phi-3 and Phi-4: fused projections, a partial rotation, longrope under several names."""
    heads = f.count(d, "num_attention_heads")
    head_dim = f.count(d, "head_dim", f.count(d, "hidden_size") // heads)
    max_len = f.count(d, "max_position_embeddings", 4096)
    given = {
        **d,
        **spelled(d),
        "original_max_position_embeddings": f.count(d, "original_max_position_embeddings", 4096),
    }
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ConfigError(
            f"rope_type={kind!r}: Phi3ForCausalLM has 'default' and 'longrope' (also called 'su' and 'yarn')."
        )
    given["rope_type"] = kind if kind == "default" else "longrope"
    return llama_like(
        d,
        "Phi3ForCausalLM",
        max_len=max_len,
        norm_eps=1e-5,
        ropes=(rope(given, head_dim=head_dim, max_len=max_len, theta=10000.0),),
        windows=uniform_windows(d, sliding_window(d)),
    )


def olmo2(d: Fields) -> ModelConfig:
    """OLMo 2: norms only after attention and MLP, and on whole rows of queries and keys."""
    bias = f.flag(d, "attention_bias")
    return llama_like(
        d,
        "Olmo2ForCausalLM",
        norm_eps=1e-5,
        pre_norm=False,
        post_norm=True,
        qk_norm="row",
        qkv_bias=bias,
        o_bias=bias,
    )


def granite(d: Fields) -> ModelConfig:
    """Granite 3: multipliers on embeddings, residuals, attention and logits."""
    bias = f.flag(d, "attention_bias")
    return llama_like(
        d,
        "GraniteForCausalLM",
        embedding_scale=f.number(d, "embedding_multiplier", 1.0),
        residual_scale=f.number(d, "residual_multiplier", 1.0),
        sm_scale=f.number(d, "attention_multiplier", 1.0),
        logit_scale=1.0 / f.number(d, "logits_scaling", 1.0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag(d, "mlp_bias"),
    )
