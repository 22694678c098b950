"""GGUF metadata as a Hugging Face config, so that a family is described once.

Sources: the GGUF specification (ggml), gguf's `constants.py`, and llama.cpp: what its converter writes for each architecture,
and what it assumes where a file says nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import MODEL_TYPES, config_from_hf
from jfp8kv.models.families.fields import is_whole, number
from jfp8kv.models.families.ropes import FULL, SLIDING

# `general.architecture`, where it is not Hugging Face's `model_type` too.
_GGUF_TYPES = {name: name for name in ("llama", "qwen2", "qwen3")} | {"gemma3": "gemma3_text"}
_GEMMA3_27B_LAYERS = (
    62  # the one size of Gemma 3 that scales scores by hidden / heads: no field of the file says so
)
# A file names one or two tokens that end a text. The families' own generation configs list these, known by their text.
_ENDS = {
    "llama": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "qwen2": ("<|endoftext|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "gemma3": ("<eos>", "<end_of_turn>"),
}

_UNCHANGED = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def config_from_gguf(
    fields: Mapping[str, Any],
    *,
    tensors: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None = None,
) -> ModelConfig:
    """A `ModelConfig` from GGUF metadata and the shapes of the file's tensors.

    `rope_factors` is the file's `rope_freqs.weight` if it has one: Llama 3.1 stores the result of its frequency
    interpolation, from which the rule is read back.
    """
    arch = str(fields.get("general.architecture"))
    if arch not in _GGUF_TYPES:
        raise ConfigError(
            f"GGUF architecture {arch!r}: not supported; supported are {', '.join(_GGUF_TYPES)}."
        )

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        return _shortest(value) if isinstance(value, float) else value

    if get("expert_count", 0):
        raise ConfigError(
            f"{arch}.expert_count={get('expert_count')}: mixture-of-experts models are not supported."
        )
    theta = _shortest(number(fields, f"{arch}.rope.freq_base", 10000.0))
    as_hf = {
        "architectures": [MODEL_TYPES[_GGUF_TYPES[arch]]],
        "vocab_size": _vocab(fields, get("vocab_size"), tensors),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": get("attention.key_length") or _by_width(get),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _gguf_rope(get, theta, rope_factors),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(fields, arch),
    }
    if arch == "gemma3":
        as_hf |= _gemma3(get)
    config = config_from_hf({key: value for key, value in as_hf.items() if value is not None})
    if (rotated := get("rope.dimension_count", config.head_dim)) != config.head_dim:
        raise ConfigError(
            f"{arch}.rope.dimension_count={rotated}: must be the whole head_dim, {config.head_dim}."
        )
    if (value_dim := get("attention.value_length", config.head_dim)) != config.head_dim:
        raise ConfigError(
            f"{arch}.attention.value_length={value_dim}: must be the keys' length, {config.head_dim}."
        )
    return dataclasses.replace(config, o_bias="blk.0.attn_output.bias" in tensors)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32, as files keep numbers: 1e-06 where the file has 9.99999997e-07."""
    return float(str(np.float32(value)))


def _vocab(fields: Mapping[str, Any], named: Any, tensors: Mapping[str, tuple[int, ...]]) -> Any:
    """Rows of the embeddings: their number counts, whatever the metadata says and however many tokens are listed."""
    if shape := tensors.get("token_embd.weight"):
        return shape[0]
    tokens = fields.get("tokenizer.ggml.tokens")
    return named or (len(tokens) if isinstance(tokens, list) else None)


def _by_width(get: Callable[..., Any]) -> int | None:
    """hidden / heads, where both are given."""
    hidden, heads = get("embedding_length"), get("attention.head_count")
    return hidden // heads if is_whole(hidden) and is_whole(heads) and heads > 0 else None


def _ends(fields: Mapping[str, Any], arch: str) -> list[Any]:
    """Every token that ends a text: those the file names, then the family's own that it has."""
    named = [fields.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    tokens = fields.get("tokenizer.ggml.tokens")
    known = (
        [tokens.index(text) for text in _ENDS[arch] if text in tokens]
        if isinstance(tokens, list)
        else []
    )
    return [token for token in named if token is not None] + known


def _gemma3(get: Callable[..., Any]) -> dict[str, Any]:
    """What Gemma 3 has beside Llama's fields. The windows' rope and pattern are the family's own in files that lack them."""
    window, pattern = get("attention.sliding_window"), get("attention.sliding_window_pattern")
    by_width = get("block_count") == _GEMMA3_27B_LAYERS
    found = {
        "sliding_window": window or None,
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": get("rope.freq_base_swa"),
        "query_pre_attn_scalar": (_by_width(get) if by_width else get("attention.key_length"))
        or _by_width(get),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    if not window:
        return found | {"sliding_window_pattern": 1}
    if isinstance(pattern, list):
        return found | {
            "sliding_window_pattern": None,
            "layer_types": [SLIDING if slides else FULL for slides in pattern],
        }
    return found


def _gguf_rope(
    get: Callable[..., Any], theta: float, factors: np.ndarray | None
) -> dict[str, Any] | None:
    """The scaling of the rope; without a type it is linear, and a factor of 0 is none."""
    if factors is not None:
        return llama3_rule(factors, theta)
    kind = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear")) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    for key, usual in _UNCHANGED.items():
        if get(key, usual) != usual:
            raise ConfigError(f"{key}={get(key)}: only {usual} is supported.")
    found = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "attention_factor": get("rope.scaling.yarn_attn_factor"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
    }
    return {key: value for key, value in found.items() if value is not None}


def llama3_rule(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The `rope_parameters` that give these frequency divisors, float32 `[head_dim / 2]`.

    Llama 3.1 to 3.3 were released with low and high factors 1 and 4 over 8192 positions and differ only in `factor`,
    the largest divisor. The rule is evaluated and must reproduce every divisor.

    Raises:
      CheckpointError: the divisors follow another rule.
    """
    factors = np.asarray(factors, np.float64)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    half = len(factors)
    wavelength = 2 * math.pi * theta ** (np.arange(half) / half)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    rule = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(rule, factors, rtol=1e-4):
        raise CheckpointError(
            "rope_freqs.weight does not follow Llama 3.1's rule (low 1, high 4, over 8192 positions): this RoPE "
            "scaling is not supported in GGUF files; load the Hugging Face folder instead."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
