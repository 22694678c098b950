"""Dense families other than Gemma: Mistral, Qwen2, Qwen3, SmolLM3, Phi3, OLMo2, Granite, GPT-2."""

import torch
from cases.case import Tensors, old, saved, sizes

MISTRAL = [
    saved(
        "mistral_window",
        3,
        "mistral",
        sizes(101, 40, 24, 3, 4, 2),
        head_dim=16,
        sliding_window=20,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    old(  # as the 7B of version 0.3: no window, no head_dim
        "mistral_null",
        2,
        "MistralForCausalLM",
        "mistral",
        sizes(103, 32, 40, 2, 4, 2),
        dtype=torch.float16,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
]

QWEN2 = [
    saved(
        "qwen2_bias",
        9238,
        "qwen2",
        sizes(107, 32, 32, 2, 4, 2),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        slow_key_bias=True,
        fp8=True,
    ),
    old(
        "qwen2_window",
        9,
        "Qwen2ForCausalLM",
        "qwen2",
        sizes(109, 32, 40, 3, 4, 2),
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
        tie_word_embeddings=False,
    ),
    old(  # as published: a window in the config that is not used
        "qwen2_window_off",
        9,
        "Qwen2ForCausalLM",
        "qwen2",
        sizes(113, 24, 32, 2, 3, 1),
        dtype=torch.float16,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        use_sliding_window=False,
        sliding_window=12,
        max_window_layers=0,
        tie_word_embeddings=False,
    ),
]

QWEN3 = [
    saved(
        "qwen3_tied",
        7,
        "qwen3",
        sizes(101, 32, 32, 2, 4, 2),
        head_dim=20,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    old(
        "qwen3_bias_window",
        0,
        "Qwen3ForCausalLM",
        "qwen3",
        sizes(103, 32, 24, 3, 4, 2),
        head_dim=16,
        attention_bias=True,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
        tie_word_embeddings=False,
    ),
]

SMOLLM3 = [
    old(  # every fourth layer has no RoPE: the interval's default
        "smollm3_interval",
        0,
        "SmolLM3ForCausalLM",
        "smollm3",
        sizes(107, 24, 24, 5, 3, 1),
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=2000000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
    ),
    saved(
        "smollm3_list",
        2,
        "smollm3",
        sizes(109, 32, 24, 3, 4, 2),
        no_rope_layers=[0, 1, 0],
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    old(  # the layers without RoPE slide
        "smollm3_window",
        13,
        "SmolLM3ForCausalLM",
        "smollm3",
        sizes(101, 32, 24, 4, 4, 2),
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=10,
        rope_theta=10000.0,
    ),
    saved(  # layers of both kinds, with and without RoPE
        "smollm3_layer_types",
        10,
        "smollm3",
        sizes(103, 32, 24, 4, 4, 2),
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=18,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
]

SHORT = [1.0, 1.05, 1.1, 1.3, 1.6, 2.0]
LONG = [1.1, 1.6, 2.5, 4.0, 7.0, 9.0]
PHI3 = [
    saved(
        "phi3_plain",
        1,
        "phi3",
        sizes(107, 32, 40, 2, 4, 4),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    old(
        "phi3_window",
        5,
        "Phi3ForCausalLM",
        "phi3",
        sizes(109, 32, 24, 3, 4, 2),
        dtype=torch.float16,
        original_max_position_embeddings=256,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=14,
        tie_word_embeddings=False,
    ),
    saved(  # partly rotated with the default rope
        "phi3_partial",
        10,
        "phi3",
        sizes(113, 32, 32, 2, 2, 1),
        tie_word_embeddings=True,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    saved(  # 85 tokens never leave the original 96: short factors
        "phi3_longrope_short",
        18,
        "phi3",
        sizes(101, 32, 32, 2, 2, 1),
        original_max_position_embeddings=96,
        partial_rotary_factor=0.75,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    ),
    old(  # the oldest name of longrope
        "phi3_longrope_long",
        1,
        "Phi3ForCausalLM",
        "phi3",
        sizes(103, 32, 32, 2, 2, 2),
        original_max_position_embeddings=32,
        partial_rotary_factor=0.75,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling={
            "type": "su",
            "original_max_position_embeddings": 32,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
        tie_word_embeddings=False,
    ),
    old(  # the ninth new token is the first that sees more than 70
        "phi3_longrope_cross",
        0,
        "Phi3ForCausalLM",
        "phi3",
        sizes(107, 32, 32, 2, 2, 1),
        original_max_position_embeddings=70,
        partial_rotary_factor=0.75,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        tie_word_embeddings=False,
    ),
]

OLMO2 = [
    saved(
        "olmo2_gqa",
        2,
        "olmo2",
        sizes(109, 32, 32, 3, 4, 2),
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    old(
        "olmo2_mha",
        2,
        "Olmo2ForCausalLM",
        "olmo2",
        sizes(113, 32, 40, 2, 4, 4),
        dtype=torch.float16,
        attention_bias=False,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=500000,
        tie_word_embeddings=False,
    ),
]

GRANITE = [
    old(
        "granite_tied",
        39,
        "GraniteForCausalLM",
        "granite",
        sizes(101, 32, 40, 3, 4, 2),
        embedding=0.6,
        embedding_multiplier=6.0,
        residual_multiplier=0.8,
        attention_multiplier=0.25,
        logits_scaling=0.25,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=10000000,
        tie_word_embeddings=True,
    ),
    saved(
        "granite_bias",
        1,
        "granite",
        sizes(103, 32, 32, 2, 4, 1),
        embedding_multiplier=0.5,
        residual_multiplier=1.5,
        attention_multiplier=0.6,
        logits_scaling=1.25,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
]


def as_published(tensors: Tensors) -> Tensors:
    """GPT-2's first names: no prefix, and the causal mask kept as a buffer of every block."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    positions = len(bare["wpe.weight"])
    mask = torch.tril(torch.ones(1, 1, positions, positions))
    for name in [name for name in bare if name.endswith("attn.c_attn.weight")]:
        block = name.removesuffix("c_attn.weight")
        bare[block + "bias"] = mask.clone()
        bare[block + "masked_bias"] = torch.tensor(-10000.0)
    return bare


def gpt2_sizes(vocab: int, hidden: int, layers: int, heads: int, positions: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
    }


GPT2 = [
    saved("gpt2_saved", 3657, "gpt2", gpt2_sizes(107, 24, 3, 3, 96)),
    old(
        "gpt2_old",
        812,
        "GPT2LMHeadModel",
        "gpt2",
        gpt2_sizes(109, 24, 2, 2, 88),
        n_ctx=88,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        relayout=as_published,
    ),
    saved(
        "gpt2_inverse",
        1143,
        "gpt2",
        gpt2_sizes(101, 32, 3, 4, 128),
        dtype=torch.float16,
        n_inner=40,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    ),
]

CASES = [*MISTRAL, *QWEN2, *QWEN3, *SMOLLM3, *PHI3, *OLMO2, *GRANITE, *GPT2]
