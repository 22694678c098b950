"""Names and layouts of the modules of each architecture in checkpoints.

There is one table of `names.ModuleLayout` per layout. Most families use Llama's names, and their
table lists the differences. Rows that a model does not have (a bias, a separate head) are not used.
"""

import re
from collections.abc import Collection, Mapping

from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import ModuleLayout

# Prefix of the decoder's tensors: none, the one of the causal model, or of a multimodal model.
_PREFIX = re.compile(
    r"^(model\.language_model|language_model\.model|language_model|model|transformer)\."
)

# Buffers that some exporters write. (GPT-2's parameter has another name, `attn.c_attn.bias`.)
_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(self_)?attn\.(masked_)?bias$"
)


def is_buffer(name: str) -> bool:
    """Return whether a Hugging Face tensor is a buffer, whose values follow from the config."""
    return _BUFFERS.search(name) is not None


def strip_prefix(name: str) -> str:
    """Return the name of a Hugging Face tensor without the prefix of the class that saved it."""
    return _PREFIX.sub("", name)


def add_prefix(config: ModelConfig, name: str) -> str:
    """Return the name of a tensor in the causal model of this architecture: see `strip_prefix`."""
    if name.startswith("lm_head."):
        return name
    return ("transformer." if config.architecture == "GPT2LMHeadModel" else "model.") + name


def _table(rows: Mapping[str, str]) -> dict[str, ModuleLayout]:
    return {native: ModuleLayout(path) for native, path in rows.items()}


def _fused(path: str, *parts: str, transposed: bool = False) -> dict[str, ModuleLayout]:
    layout = ModuleLayout(path, parts, transposed=transposed)
    return {f"layers.{part}": layout for part in parts}


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
# With norms before and after, "post_attention_layernorm" is the norm after attention. In Llama it
# is the norm before the MLP.
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
# All experts of a layer in one tensor, with gate and up fused: the layout of transformers 5.
_PACKED_SUFFIXES = {"weight": "", "bias": "_bias"}
_PACKED = {
    f"layers.experts.{part}": ModuleLayout(
        "layers.{layer}.mlp.experts.gate_up_proj",
        ("experts.gate", "experts.up"),
        suffixes=_PACKED_SUFFIXES,
    )
    for part in ("gate", "up")
} | {
    "layers.experts.down": ModuleLayout(
        "layers.{layer}.mlp.experts.down_proj", suffixes=_PACKED_SUFFIXES
    )
}
_GPT_OSS = {
    "layers.experts.router": ModuleLayout("layers.{layer}.mlp.router"),
    "layers.experts.down": ModuleLayout(
        "layers.{layer}.mlp.experts.down_proj", transposed=True, suffixes=_PACKED_SUFFIXES
    ),
} | {
    f"layers.experts.{part}": ModuleLayout(
        "layers.{layer}.mlp.experts.gate_up_proj",
        ("experts.gate", "experts.up"),
        interleaved=True,
        transposed=True,
        suffixes=_PACKED_SUFFIXES,
    )
    for part in ("gate", "up")
}
_GPT2 = {
    "embed": ModuleLayout("wte"),
    "positions": ModuleLayout("wpe"),
    "layers.attention_norm": ModuleLayout("h.{layer}.ln_1"),
    "layers.o": ModuleLayout("h.{layer}.attn.c_proj", transposed=True),
    "layers.mlp_norm": ModuleLayout("h.{layer}.ln_2"),
    "layers.up": ModuleLayout("h.{layer}.mlp.c_fc", transposed=True),
    "layers.down": ModuleLayout("h.{layer}.mlp.c_proj", transposed=True),
    "norm": ModuleLayout("ln_f"),
    "head": ModuleLayout("lm_head"),
} | _fused("h.{layer}.attn.c_attn", "q", "k", "v", transposed=True)

# By architecture: the modules that differ from Llama's.
_OVERRIDES: dict[str, Mapping[str, ModuleLayout]] = {
    "Gemma2ForCausalLM": _POST_NORMS,
    "Gemma3ForCausalLM": _POST_NORMS,
    "Olmo2ForCausalLM": _POST_NORMS,
    "Phi3ForCausalLM": _PHI3,
    "MixtralForCausalLM": _MIXTRAL,
    "GptOssForCausalLM": _GPT_OSS,
    "GPT2LMHeadModel": _GPT2,
}


def hf_modules(config: ModelConfig, found: Collection[str]) -> dict[str, ModuleLayout]:
    """Return the layout of a Hugging Face checkpoint.

    Args:
      config: of the model.
      found: names of the tensors in the checkpoint, without prefix.
    """
    modules = _LLAMA | dict(_OVERRIDES.get(config.architecture, {}))
    if config.architecture != "GptOssForCausalLM" and any(
        name.endswith(".mlp.experts.gate_up_proj") for name in found
    ):
        modules |= {"layers.experts.router": ModuleLayout("layers.{layer}.mlp.gate")} | _PACKED
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


def gguf_modules(config: ModelConfig) -> dict[str, ModuleLayout]:
    """Return the layout of a GGUF file, as the converter of llama.cpp writes it.

    Llama's q and k have their rows in pairs for interleaved RoPE. Gemma's norms have 1 added.
    """
    modules = _table(_GGUF)
    if config.architecture == "LlamaForCausalLM":
        heads = {"layers.q": config.q_heads, "layers.k": config.kv_heads}
        modules |= {name: ModuleLayout(_GGUF[name], heads=count) for name, count in heads.items()}
    if config.norm == "rms_plus_one":
        modules |= {
            name: ModuleLayout(path, offset=-1.0)
            for name, path in _GGUF.items()
            if name.endswith("norm")
        }
    return modules
