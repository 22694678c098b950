"""Families with Llama's layers: Llama, Mistral, SmolLM3, Phi-3, OLMo 2, Granite."""

from dataclasses import replace

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    llama_like,
    read_layer_types,
    sliding_window,
    uniform_windows,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import (
    FULL,
    ORIGINAL,
    SLIDING,
    read_rope,
    read_ropes,
    rope_entries,
    unique_ropes,
)


def llama(d: Fields) -> ModelConfig:
    """Return the config of a Llama 1 to 3, or of a model with its layers, such as SmolLM2.

    `attention_bias` covers q, k, v and o.
    """
    bias = f.flag(d, "attention_bias")
    config = llama_like(d, "LlamaForCausalLM")
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag(d, "mlp_bias"))


def mistral(d: Fields) -> ModelConfig:
    """Return the config of a Mistral: a sliding window on every layer, unless it is null."""
    config = llama_like(d, "MistralForCausalLM", max_len=131072, kv_heads=8)
    return replace(config, windows=uniform_windows(d, sliding_window(d, 4096)))


def smollm3(d: Fields) -> ModelConfig:
    """Return the config of a SmolLM3: no rotation on some layers.

    `no_rope_layers` lists them (1 rotates, 0 does not); by default it is every fourth layer.
    """
    layers = f.count(d, "num_hidden_layers")
    step = f.count(d, "no_rope_layer_interval", 4)
    by_default = [(layer + 1) % step != 0 for layer in range(layers)]
    rotates = f.by_layer(d, "no_rope_layers", layers) or by_default
    window = sliding_window(d)
    slides = f.flag(d, "use_sliding_window") and window
    default_types = [SLIDING if slides and not rotated else FULL for rotated in rotates]
    types = read_layer_types(d, layers, default_types)
    default_head_dim = f.count(d, "hidden_size") // f.count(d, "num_attention_heads")
    head_dim = f.count(d, "head_dim", default_head_dim)
    max_len = f.count(d, "max_position_embeddings", 32768)
    ropes, indices = read_ropes(d, types, head_dim=head_dim, max_len=max_len, theta=2e6)
    by_layer = [
        ropes[indices[layer] if indices else 0] if rotates[layer] else None
        for layer in range(layers)
    ]
    bias = f.flag(d, "attention_bias")
    config = llama_like(
        d,
        "SmolLM3ForCausalLM",
        max_len=max_len,
        tied=True,
        kv_heads=4,
        ropes=unique_ropes(by_layer),
    )
    return replace(
        config,
        windows=windows(types, window),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag(d, "mlp_bias"),
    )


def phi3(d: Fields) -> ModelConfig:
    """Return the config of a Phi-3 or Phi-4: partial rotation, and longrope under several names."""
    heads = f.count(d, "num_attention_heads")
    head_dim = f.count(d, "head_dim", f.count(d, "hidden_size") // heads)
    max_len = f.count(d, "max_position_embeddings", 4096)
    entries = {**d, **rope_entries(d), ORIGINAL: f.count(d, ORIGINAL, 4096)}
    kind = entries.get("rope_type") or entries.get("type") or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ConfigError(
            f"rope_type={kind!r}: Phi3ForCausalLM has 'default' and 'longrope' (also called 'su' "
            "and 'yarn')."
        )
    entries["rope_type"] = kind if kind == "default" else "longrope"
    rope = read_rope(entries, head_dim=head_dim, max_len=max_len, theta=10000.0)
    config = llama_like(d, "Phi3ForCausalLM", max_len=max_len, norm_eps=1e-5, ropes=((rope,), ()))
    return replace(config, windows=uniform_windows(d, sliding_window(d)))


def olmo2(d: Fields) -> ModelConfig:
    """Return the config of an OLMo 2: norms after attention and MLP, and on rows of q and k."""
    bias = f.flag(d, "attention_bias")
    config = llama_like(d, "Olmo2ForCausalLM", norm_eps=1e-5)
    return replace(
        config, pre_norm=False, post_norm=True, qk_norm="row", qkv_bias=bias, o_bias=bias
    )


def granite(d: Fields) -> ModelConfig:
    """Return the config of a Granite 3: multipliers on embeddings, residuals, scores and logits."""
    bias = f.flag(d, "attention_bias")
    return replace(
        llama_like(d, "GraniteForCausalLM"),
        embedding_scale=f.number(d, "embedding_multiplier", 1.0),
        residual_scale=f.number(d, "residual_multiplier", 1.0),
        sm_scale=f.number(d, "attention_multiplier", 1.0),
        logit_scale=1.0 / f.number(d, "logits_scaling", 1.0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag(d, "mlp_bias"),
    )
