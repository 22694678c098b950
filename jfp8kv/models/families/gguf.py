"""GGUF metadata as a Hugging Face config, so that a family is described once."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import MODEL_TYPES, config_from_hf
from jfp8kv.models.families.fields import number

# `general.architecture`, where it is not Hugging Face's `model_type` too.
_GGUF_TYPES = {name: name for name in ("llama", "qwen2", "qwen3")} | {"gemma3": "gemma3_text"}
_GEMMA3_27B_LAYERS = 62  # the one size of Gemma 3 that scales scores by hidden / heads: no field of the file says so


def config_from_gguf(
    fields: Mapping[str, Any], *, tensors: Collection[str], rope_factors: np.ndarray | None = None
) -> ModelConfig:
    """A `ModelConfig` from GGUF metadata and the names of the file's tensors.

    `rope_factors` is the file's `rope_freqs.weight` if it has one: Llama 3.1 stores the result of its frequency
    interpolation, from which the rule is read back. Sources: the GGUF specification (ggml), gguf's `constants.py`.
    """
    arch = str(fields.get("general.architecture"))
    if arch not in _GGUF_TYPES:
        raise ConfigError(f"GGUF architecture {arch!r}: not supported; supported are {', '.join(_GGUF_TYPES)}.")

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{key}", default)

    if get("expert_count", 0):
        raise ConfigError(f"{arch}.expert_count={get('expert_count')}: mixture-of-experts models are not supported.")
    theta = number(fields, f"{arch}.rope.freq_base", 10000.0)
    tokens = fields.get("tokenizer.ggml.tokens")
    as_hf = {
        "architectures": [MODEL_TYPES[_GGUF_TYPES[arch]]],
        "vocab_size": get("vocab_size") or (len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _gguf_rope(get, theta, rope_factors),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            fields[key]
            for key in (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
            if fields.get(key) is not None
        ],
    }
    if arch == "gemma3":
        as_hf |= _gemma3(get, as_hf["hidden_size"], as_hf["num_attention_heads"])
    config = config_from_hf({key: value for key, value in as_hf.items() if value is not None})
    if (rotated := get("rope.dimension_count", config.head_dim)) != config.head_dim:
        raise ConfigError(f"{arch}.rope.dimension_count={rotated}: must be the whole head_dim, {config.head_dim}.")
    if (value_dim := get("attention.value_length", config.head_dim)) != config.head_dim:
        raise ConfigError(f"{arch}.attention.value_length={value_dim}: must be the keys' length, {config.head_dim}.")
    return dataclasses.replace(config, o_bias="blk.0.attn_output.bias" in tensors)


def _gemma3(get: Callable[..., Any], hidden: Any, heads: Any) -> dict[str, Any]:
    """What Gemma 3 has beside Llama's fields; the windows' rope and pattern are the family's own in files that lack them."""
    by_width = get("block_count") == _GEMMA3_27B_LAYERS and isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    return {
        "sliding_window": get("attention.sliding_window"),
        "sliding_window_pattern": get("attention.sliding_window_pattern"),
        "rope_local_base_freq": get("rope.freq_base_swa"),
        "query_pre_attn_scalar": hidden // heads if by_width else get("attention.key_length"),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }


def _gguf_rope(get: Callable[..., Any], theta: float, factors: np.ndarray | None) -> dict[str, Any] | None:
    if factors is not None:
        return llama3_rule(factors, theta)
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if kind == "none" and get("rope.scale_linear") is None:
        return None
    original = get("rope.scaling.original_context_length")
    return {
        "rope_type": "linear" if kind == "none" else kind,
        "factor": factor,
        **({"original_max_position_embeddings": original} if original else {}),
    }


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
