"""GPT-2: learned positions, LayerNorm with biases, and an MLP without a gate."""

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.common import require_valid
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.quantization import declared_kv_dtype


def gpt2(d: Fields) -> ModelConfig:
    """Return the config of a GPT-2, whose fields have other names (`n_embd`, `n_head`, ...)."""
    f.refuse(
        d,
        "add_cross_attention",
        False,
        reason="cross-attention needs an encoder; only decoders are supported",
    )
    hidden = f.count(d, "n_embd", 768)
    heads = f.count(d, "n_head", 12)
    activation = d.get("activation_function", "gelu_new")
    vocab = f.count(d, "vocab_size", 50257)
    config = ModelConfig(
        architecture="GPT2LMHeadModel",
        vocab=vocab,
        hidden=hidden,
        layers=f.count(d, "n_layer", 12),
        q_heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp_hidden=f.count(d, "n_inner", 4 * hidden),
        max_len=f.count(d, "n_positions", 1024),
        norm_eps=f.number(d, "layer_norm_epsilon", 1e-5),
        activation=f.activation(activation, "activation_function"),
        ropes=(),
        learned_positions=True,
        norm="layer",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        sm_scale=None if f.flag(d, "scale_attn_weights", True) else 1.0,
        scale_by_layer=f.flag(d, "scale_attn_by_inverse_layer_idx"),
        tied_embeddings=f.flag(d, "tie_word_embeddings", True),
        bos_id=f.token_id(d, "bos_token_id", vocab, 50256),
        eos_ids=f.eos_ids(d, vocab, 50256),
        dtype=f.dtype(d),
        kv_cache_dtype=declared_kv_dtype(f.mapping(d, "quantization_config")),
    )
    return require_valid(config)
