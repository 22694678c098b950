"""Write tiny checkpoints with the libraries of their formats: safetensors, gguf and tokenizers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def hf_config(**changes: Any) -> dict[str, Any]:
    """Return a `config.json` of two GQA layers. `changes` replace entries, None removes one."""
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


# By family that GGUF files are supported for: the entries that differ from `hf_config`'s.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": None,
        "hidden_size": 64,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
}


def family_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return a small `config.json` of a family, like `hf_config`."""
    return hf_config(**(FAMILIES[family] | changes))


def hf_tensors(
    config: Mapping[str, Any], dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random weights under Hugging Face's names, listed one by one."""
    random = np.random.default_rng(seed)
    family, hidden, mlp = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    biased = "qkvo" if config.get("attention_bias") else "qkv" if family == "qwen2" else ""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        if family == "gemma3_text":
            shapes[at + "pre_feedforward_layernorm.weight"] = (hidden,)
            shapes[at + "post_feedforward_layernorm.weight"] = (hidden,)
        if family in ("qwen3", "gemma3_text"):
            shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = (
                head_dim,
            )
        for name, out, into in (
            ("q", q, hidden),
            ("k", kv, hidden),
            ("v", kv, hidden),
            ("o", hidden, q),
        ):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (out, into)
            if name in biased:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (out,)
        for name, out, into in (("gate", mlp, hidden), ("up", mlp, hidden), ("down", hidden, mlp)):
            shapes[f"{at}mlp.{name}_proj.weight"] = (out, into)
            if config.get("mlp_bias"):
                shapes[f"{at}mlp.{name}_proj.bias"] = (out,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: random.normal(size=shape).astype(np.float32).astype(dtype)
        for name, shape in shapes.items()
    }


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1
) -> Path:
    """Write a Hugging Face folder with one weight file, or with shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


_COMPRESSED = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_QUARK = {
    f"*{part}_proj": {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
    for part in "kv"
}
# By naming convention: the names of K's and V's scale in a layer, and what config.json declares.
SCALE_LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "compressed-tensors": (
        "self_attn.k_scale",
        "self_attn.v_scale",
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": _COMPRESSED},
    ),
    "ModelOpt": (
        "self_attn.k_proj.k_scale",
        "self_attn.v_proj.v_scale",
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    ),
    "Quark": (
        "self_attn.k_proj.output_scale",
        "self_attn.v_proj.output_scale",
        {"quant_method": "quark", "kv_cache_quant_config": _QUARK},
    ),
}
_DECLARED = SCALE_LAYOUTS["compressed-tensors"][2]
SCALE_LAYOUTS |= {
    "fused": ("self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale", _DECLARED),
    "attention": ("self_attn.attn.k_scale", "self_attn.attn.v_scale", _DECLARED),
    "cache": ("self_attn.k_cache.scale", "self_attn.v_cache.scale", _DECLARED),
    "module": ("self_attn.k.scale", "self_attn.v.scale", _DECLARED),
    "mixer": ("mixer.k_proj.k_scale", "mixer.v_proj.v_scale", _DECLARED),
    "AutoFP8": ("self_attn.kv_scale", "self_attn.kv_scale", _DECLARED),
}


def scale_tensors(
    layout: str,
    k: Any,
    v: Any,
    dtype: Any = np.float32,
    shape: tuple[int, ...] | None = None,
    at: str = "model.layers.",
) -> dict[str, np.ndarray]:
    """Return scale tensors from `k` and `v`, `[layers]` or `[layers, heads]`, in a `shape`."""
    tensors = {}
    for name, values in zip(SCALE_LAYOUTS[layout], (k, v), strict=False):
        for layer, value in enumerate(values):
            stored = np.asarray(value, np.float32).astype(dtype)
            tensors[f"{at}{layer}.{name}"] = stored if shape is None else stored.reshape(shape)
    return tensors


def write_sidecar(
    folder: Path, ranks: Any, dtype: str = "float8_e4m3fn", model_type: str = "llama"
) -> Path:
    """Write vLLM's `kv_cache_scales.json`. `ranks` are lists of one scale per layer."""
    factors = {
        str(rank): {
            str(layer): s if isinstance(s, int) else float(s) for layer, s in enumerate(scales)
        }
        for rank, scales in enumerate(ranks)
    }
    content = {"model_type": model_type, "kv_cache": {"dtype": dtype, "scaling_factor": factors}}
    (folder / "kv_cache_scales.json").write_text(json.dumps(content))
    return folder


def byte_level_vocab() -> tuple[list[str], list[str]]:
    """Return tokens and merges of a small byte-level BPE, ChatML's special tokens first."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"]
    return SPECIAL + bytes_ + [merge.replace(" ", "") for merge in merges], merges


def write_tokenizer(folder: Path, chat_template: str | None = CHATML, **settings: Any) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` of the small byte-level BPE."""
    tokens, merges = byte_level_vocab()
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


def rows_in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute q or k as llama.cpp does: row 2j of a head is row j, row 2j + 1 is row half + j."""
    head_dim = len(weight) // heads
    half = head_dim // 2
    out = np.empty_like(weight)
    for head in range(heads):
        for j in range(half):
            out[head * head_dim + 2 * j] = weight[head * head_dim + j]
            out[head * head_dim + 2 * j + 1] = weight[head * head_dim + half + j]
    return out


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantize: gguf.GGMLQuantizationType | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    skip: tuple[str, ...] = (),
) -> Path:
    """Write a model as llama.cpp's converter does, with matrices quantized to `quantize`.

    Vectors are float32, rows of Llama's q and k are permuted, and Gemma's norms have 1 added.
    """
    arch = config["model_type"].removesuffix("_text")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, config)
    more(writer)
    for name, weight in tensors.items():
        if name in skip:
            continue
        for part, heads in (
            ("q_proj", config["num_attention_heads"]),
            ("k_proj", config["num_key_value_heads"]),
        ):
            weight = rows_in_pairs(weight, heads) if arch == "llama" and part in name else weight
        if weight.ndim == 1 and weight.dtype.kind != "i":
            weight = weight.astype(np.float32) + np.float32(arch == "gemma3")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = gguf.GGMLQuantizationType.BF16 if weight.dtype == "bfloat16" else quantize
        if kind is None or weight.ndim == 1:
            writer.add_tensor(found, weight)
        else:
            writer.add_tensor(
                found, gguf.quants.quantize(weight.astype(np.float32), kind), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write the entries of a `config.json` under GGUF's names, as the family's converter does."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if config["model_type"] == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        if "final_logit_softcapping" in config:
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if scaling := config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        for key, add in (
            ("original_max_position_embeddings", writer.add_rope_scaling_orig_ctx_len),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if key in scaling:
                add(scaling[key])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def run_python(code: str, *args: object, **env: str) -> str:
    """Run `code` in a new interpreter and return its output. A failure shows the traceback."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Give tests the writers of this file."""
    return SimpleNamespace(
        config=hf_config,
        family=family_config,
        tensors=hf_tensors,
        folder=write_folder,
        tokenizer=write_tokenizer,
        gguf=write_gguf,
        vocab=byte_level_vocab,
        run_python=run_python,
        chatml=CHATML,
        scale_layouts=SCALE_LAYOUTS,
        scales=scale_tensors,
        sidecar=write_sidecar,
    )
