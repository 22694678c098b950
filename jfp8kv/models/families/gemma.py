"""Gemma 1, 2 and 3 (text): norms of 1 + weight, scaled embeddings, soft caps, windows."""

from dataclasses import replace

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import (
    alternating,
    llama_like,
    read_layer_types,
    sliding_window,
    windows,
)
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import (
    FULL,
    SLIDING,
    LayerRopes,
    Ropes,
    read_rope,
    unique_ropes,
)

# Fields of a multimodal config that the text model takes from it.
_SHARED_FIELDS = (
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "quantization_config",
    "tie_word_embeddings",
)
# `text_config` only lists values that differ from these defaults.
_GEMMA3_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def _gemma(
    d: Fields,
    architecture: str,
    *,
    kv_heads: int,
    max_len: int = 8192,
    activation_key: str = "hidden_act",
    layer_types: list[str] | None = None,
    ropes: tuple[Ropes, LayerRopes] | None = None,
) -> ModelConfig:
    """Return the fields that all versions share. The arguments are those of `llama_like`."""
    f.refuse(
        d,
        "use_bidirectional_attention",
        False,
        reason="attention to later tokens is not supported in a decoder",
    )
    bias = f.flag(d, "attention_bias")
    config = llama_like(
        d,
        architecture,
        max_len=max_len,
        head_dim=256,
        kv_heads=kv_heads,
        tied=True,
        activation="gelu_pytorch_tanh",
        activation_key=activation_key,
        layer_types=layer_types or (),
        ropes=ropes,
    )
    return replace(
        config,
        norm="rms_plus_one",
        embedding_scale=config.hidden**0.5,
        qkv_bias=bias,
        o_bias=bias,
    )


def _with_gemma2_attention(d: Fields, config: ModelConfig, layer_types: list[str]) -> ModelConfig:
    """Add what Gemma 2 and 3 share: post-norms, a query scale, and windows on some layers."""
    return replace(
        config,
        post_norm=True,
        sm_scale=f.number(d, "query_pre_attn_scalar", 256.0) ** -0.5,
        windows=windows(layer_types, sliding_window(d, 4096)),
    )


def gemma(d: Fields) -> ModelConfig:
    """Return the config of a Gemma 1. In early configs "gelu" means the tanh approximation."""
    name = d.get("hidden_act")
    d = {**d, "hidden_act": "gelu_pytorch_tanh" if name == "gelu" else name}
    return _gemma(d, "GemmaForCausalLM", kv_heads=16)


def gemma2(d: Fields) -> ModelConfig:
    """Return the config of a Gemma 2: soft caps on scores and logits.

    Windows alternate, beginning with the first layer.
    """
    layers = f.count(d, "num_hidden_layers")
    types = read_layer_types(d, layers, alternating(2, layers))
    config = _gemma(
        d,
        "Gemma2ForCausalLM",
        kv_heads=4,
        activation_key="hidden_activation",
        layer_types=types,
    )
    return replace(
        _with_gemma2_attention(d, config, types),
        softcap=f.optional_number(d, "attn_logit_softcapping", 50.0),
        logit_softcap=f.optional_number(d, "final_logit_softcapping", 30.0),
    )


def gemma3(d: Fields) -> ModelConfig:
    """Return the config of a Gemma 3 text model.

    Five layers with windows alternate with one of full attention, and each type has its rope. The
    configs contain `attn_logit_softcapping` from Gemma 2, which no implementation applies.
    """
    layers = f.count(d, "num_hidden_layers")
    period = f.count(d, "sliding_window_pattern", 6)
    types = read_layer_types(d, layers, alternating(period, layers))
    max_len = f.count(d, "max_position_embeddings", 131072)
    config = _gemma(
        d,
        "Gemma3ForCausalLM",
        kv_heads=4,
        max_len=max_len,
        activation_key="hidden_activation",
        ropes=_gemma3_ropes(d, types, max_len),
    )
    return replace(
        _with_gemma2_attention(d, config, types),
        max_len=max_len,  # already includes the scaling of the rope
        qk_norm="head",
        logit_softcap=f.optional_number(d, "final_logit_softcapping"),
    )


def _gemma3_ropes(d: Fields, types: list[str], max_len: int) -> tuple[Ropes, LayerRopes]:
    """Return the rope of each type of layer.

    In the old spelling, `rope_theta` and `rope_scaling` are for full attention, and
    `rope_local_base_freq` for windows.
    """
    head_dim = f.count(d, "head_dim", 256)
    by_type = f.mapping(d, "rope_parameters")
    full = {"rope_theta": d.get("rope_theta")}
    full |= f.mapping(by_type, FULL)
    full |= f.mapping(d, "rope_scaling")
    sliding = {"rope_theta": d.get("rope_local_base_freq")}
    sliding |= f.mapping(by_type, SLIDING)
    ropes = {
        FULL: read_rope(full, head_dim=head_dim, max_len=max_len, theta=1e6),
        SLIDING: read_rope(sliding, head_dim=head_dim, max_len=max_len, theta=1e4),
    }
    return unique_ropes([ropes[kind] for kind in types])


def gemma3_multimodal(d: Fields) -> ModelConfig:
    """Return the config of the text model of a multimodal Gemma 3."""
    text = dict(f.mapping(d, "text_config"))
    for key in _SHARED_FIELDS:
        if d.get(key) is not None:
            text.setdefault(key, d[key])
    return gemma3(_GEMMA3_TEXT_DEFAULTS | text)
