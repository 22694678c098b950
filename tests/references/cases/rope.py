"""Llamas with the rope types that the first Llamas leave out."""

from cases.case import old, saved, sizes


def llama_old(name: str, seed: int, vocab: int, positions: int, **config):
    shape = sizes(vocab, 32, 24, 2, 4, 2) | {"max_position_embeddings": positions}
    return old(
        name,
        seed,
        "LlamaForCausalLM",
        "llama",
        shape,
        head_dim=16,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        **config,
    )


def llama_saved(name: str, seed: int, vocab: int, positions: int, **rope):
    shape = sizes(vocab, 32, 24, 2, 4, 2) | {"max_position_embeddings": positions}
    return saved(name, seed, "llama", shape, head_dim=16, rope_parameters=rope)


SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0]
LONG = [1.0, 1.4, 2.0, 3.0, 4.5, 6.0, 8.0, 9.0]

CASES = [
    # the prompt is already longer than the trained 40 positions
    llama_old(
        "rope_dynamic",
        49,
        101,
        40,
        rope_theta=500.0,
        rope_scaling={"type": "dynamic", "factor": 4.0},
    ),
    # it becomes longer than 70 while generating
    llama_saved(
        "rope_dynamic_cross", 6, 103, 70, rope_type="dynamic", rope_theta=500.0, factor=8.0
    ),
    llama_saved(
        "rope_yarn",
        11,
        107,
        128,
        rope_type="yarn",
        rope_theta=500.0,
        factor=4.0,
        original_max_position_embeddings=32,
    ),
    llama_saved(
        "rope_yarn_mscale",
        13,
        109,
        128,
        rope_type="yarn",
        rope_theta=10000.0,
        factor=8.0,
        original_max_position_embeddings=24,
        mscale=2.0,
        mscale_all_dim=0.5,
        beta_fast=8,
        beta_slow=0.5,
    ),
    llama_old(
        "rope_yarn_attention",
        2,
        113,
        128,
        rope_theta=1000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.25,
            "beta_fast": 4.0,
            "beta_slow": 0.25,
            "truncate": False,
        },
    ),
    llama_saved(
        "rope_longrope_long",
        5,
        101,
        256,
        rope_type="longrope",
        rope_theta=1000.0,
        factor=8.0,
        original_max_position_embeddings=32,
        short_factor=SHORT,
        long_factor=LONG,
    ),
    llama_saved(
        "rope_longrope_cross",
        6,
        103,
        256,
        rope_type="longrope",
        rope_theta=1000.0,
        original_max_position_embeddings=70,
        attention_factor=1.1,
        short_factor=SHORT,
        long_factor=LONG,
    ),
]
