"""How checkpoints name and lay out the modules of each architecture: one table a layout, in the terms of `names.Module`.

Most families keep Llama's names; a table of theirs lists what differs. A row that a model does not have (a bias, a head of its
own) is simply not asked for.
"""

import re
from collections.abc import Collection, Mapping

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import Module

# What stands before the names of a bare decoder: nothing, the causal model's prefix, or the text part of one that also sees.
_PREFIX = re.compile(
    r"^(model\.language_model|language_model\.model|language_model|model|transformer)\."
)

# Buffers that some exporters write and no decoder needs. A bias of GPT-2's is `attn.c_attn.bias`.
_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(self_)?attn\.(masked_)?bias$"
)


def is_buffer(name: str) -> bool:
    """Whether a Hugging Face tensor is a buffer that follows from the config, and so is left out."""
    return _BUFFERS.search(name) is not None


def bare(name: str) -> str:
    """A Hugging Face tensor's name without the prefix that says which class saved it."""
    return _PREFIX.sub("", name)


def full_name(config: ModelConfig, name: str) -> str:
    """The name that the causal model of this architecture saves a tensor of this bare name under."""
    if name.startswith("lm_head."):
        return name
    return ("transformer." if config.architecture == "GPT2LMHeadModel" else "model.") + name


def _table(rows: Mapping[str, str]) -> dict[str, Module]:
    return {ours: Module(theirs) for ours, theirs in rows.items()}


def _fused(
    path: str, *parts: str, interleaved: bool = False, transposed: bool = False
) -> dict[str, Module]:
    module = Module(path, parts, interleaved=interleaved, transposed=transposed)
    return {f"layers.{part}": module for part in parts}


_LLAMA = _table(
    {
        "embed": "embed_tokens",
        "layers.attention_norm": "layers.{layer}.input_layernorm",
        "layers.q": "layers.{layer}.self_attn.q_proj",
        "layers.k": "layers.{layer}.self_attn.k_proj",
        "layers.v": "layers.{layer}.self_attn.v_proj",
        "layers.o": "layers.{layer}.self_attn.o_proj",
        "layers.q_norm": "layers.{layer}.self_attn.q_norm",
        "layers.k_norm": "layers.{layer}.self_attn.k_norm",
        "layers.sinks": "layers.{layer}.self_attn.sinks",
        "layers.mlp_norm": "layers.{layer}.post_attention_layernorm",
        "layers.gate": "layers.{layer}.mlp.gate_proj",
        "layers.up": "layers.{layer}.mlp.up_proj",
        "layers.down": "layers.{layer}.mlp.down_proj",
        "layers.experts.router": "layers.{layer}.mlp.gate",
        "layers.experts.gate": "layers.{layer}.mlp.experts.{expert}.gate_proj",
        "layers.experts.up": "layers.{layer}.mlp.experts.{expert}.up_proj",
        "layers.experts.down": "layers.{layer}.mlp.experts.{expert}.down_proj",
        "layers.experts.shared_gate": "layers.{layer}.mlp.shared_expert.gate_proj",
        "layers.experts.shared_up": "layers.{layer}.mlp.shared_expert.up_proj",
        "layers.experts.shared_down": "layers.{layer}.mlp.shared_expert.down_proj",
        "layers.experts.shared_switch": "layers.{layer}.mlp.shared_expert_gate",
        "norm": "norm",
        "head": "lm_head",
    }
)
# Norms before and after: "post_attention_layernorm" is then what it says, where Llama calls the MLP's norm so.
_POST_NORMS = _table(
    {
        "layers.attention_post_norm": "layers.{layer}.post_attention_layernorm",
        "layers.mlp_norm": "layers.{layer}.pre_feedforward_layernorm",
        "layers.mlp_post_norm": "layers.{layer}.post_feedforward_layernorm",
    }
)
_PHI3 = _fused("layers.{layer}.self_attn.qkv_proj", "q", "k", "v") | _fused(
    "layers.{layer}.mlp.gate_up_proj", "gate", "up"
)
_MIXTRAL = _table(
    {
        "layers.experts.router": "layers.{layer}.block_sparse_moe.gate",
        "layers.experts.gate": "layers.{layer}.block_sparse_moe.experts.{expert}.w1",
        "layers.experts.up": "layers.{layer}.block_sparse_moe.experts.{expert}.w3",
        "layers.experts.down": "layers.{layer}.block_sparse_moe.experts.{expert}.w2",
    }
)
# All experts of a layer in one tensor, gate and up fused: what transformers 5 holds in memory.
_WHOLE = {"weight": "", "bias": "_bias"}
_PACKED = {
    f"layers.experts.{part}": Module(
        "layers.{layer}.mlp.experts.gate_up_proj", ("experts.gate", "experts.up"), leaves=_WHOLE
    )
    for part in ("gate", "up")
} | {"layers.experts.down": Module("layers.{layer}.mlp.experts.down_proj", leaves=_WHOLE)}
_GPT_OSS = {
    "layers.experts.router": Module("layers.{layer}.mlp.router"),
    "layers.experts.down": Module(
        "layers.{layer}.mlp.experts.down_proj", transposed=True, leaves=_WHOLE
    ),
} | {
    f"layers.experts.{part}": Module(
        "layers.{layer}.mlp.experts.gate_up_proj",
        ("experts.gate", "experts.up"),
        interleaved=True,
        transposed=True,
        leaves=_WHOLE,
    )
    for part in ("gate", "up")
}
_GPT2 = {
    "embed": Module("wte"),
    "positions": Module("wpe"),
    "layers.attention_norm": Module("h.{layer}.ln_1"),
    "layers.o": Module("h.{layer}.attn.c_proj", transposed=True),
    "layers.mlp_norm": Module("h.{layer}.ln_2"),
    "layers.up": Module("h.{layer}.mlp.c_fc", transposed=True),
    "layers.down": Module("h.{layer}.mlp.c_proj", transposed=True),
    "norm": Module("ln_f"),
    "head": Module("lm_head"),
} | _fused("h.{layer}.attn.c_attn", "q", "k", "v", transposed=True)

_DIFFERENT: dict[str, Mapping[str, Module]] = {
    "Gemma2ForCausalLM": _POST_NORMS,
    "Gemma3ForCausalLM": _POST_NORMS,
    "Olmo2ForCausalLM": _POST_NORMS,
    "Phi3ForCausalLM": _PHI3,
    "MixtralForCausalLM": _MIXTRAL,
    "GptOssForCausalLM": _GPT_OSS,
    "GPT2LMHeadModel": _GPT2,
}


def hf_modules(config: ModelConfig, found: Collection[str]) -> dict[str, Module]:
    """The layout of a Hugging Face checkpoint of this architecture that holds the tensors `found` (bare names)."""
    modules = _LLAMA | dict(_DIFFERENT.get(config.architecture, {}))
    if config.architecture != "GptOssForCausalLM" and any(
        name.endswith(".mlp.experts.gate_up_proj") for name in found
    ):
        modules |= {"layers.experts.router": Module("layers.{layer}.mlp.gate")} | _PACKED
    return modules


_GGUF = {
    "embed": "token_embd",
    "layers.attention_norm": "blk.{layer}.attn_norm",
    "layers.attention_post_norm": "blk.{layer}.post_attention_norm",
    "layers.q": "blk.{layer}.attn_q",
    "layers.k": "blk.{layer}.attn_k",
    "layers.v": "blk.{layer}.attn_v",
    "layers.o": "blk.{layer}.attn_output",
    "layers.q_norm": "blk.{layer}.attn_q_norm",
    "layers.k_norm": "blk.{layer}.attn_k_norm",
    "layers.mlp_norm": "blk.{layer}.ffn_norm",
    "layers.mlp_post_norm": "blk.{layer}.post_ffw_norm",
    "layers.gate": "blk.{layer}.ffn_gate",
    "layers.up": "blk.{layer}.ffn_up",
    "layers.down": "blk.{layer}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}


def gguf_modules(config: ModelConfig) -> dict[str, Module]:
    """The layout of a GGUF file of this architecture, as llama.cpp's converter writes it.

    Llama's q and k are kept in pairs for interleaved RoPE; Gemma's norms are stored with their 1 added.
    """
    modules = _table(_GGUF)
    if config.architecture == "LlamaForCausalLM":
        heads = {"layers.q": config.q_heads, "layers.k": config.kv_heads}
        modules |= {ours: Module(_GGUF[ours], heads=count) for ours, count in heads.items()}
    if config.norm == "rms_plus_one":
        modules |= {
            ours: Module(path, offset=-1.0) for ours, path in _GGUF.items() if ours.endswith("norm")
        }
    return modules
