"""Convert GGUF metadata to a Hugging Face config, so that a family is described once.

Sources: the GGUF specification (ggml), gguf's `constants.py`, and llama.cpp: the metadata that its
converter writes for each architecture, and its defaults for missing metadata.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import MODEL_TYPES, config_from_hf
from jfp8kv.models.families.fields import ids_in_vocab, is_integer, number
from jfp8kv.models.families.ropes import FULL, ORIGINAL, SLIDING

# By `general.architecture`: Hugging Face's `model_type`.
_HF_TYPES = {name: name for name in ("llama", "qwen2", "qwen3")} | {"gemma3": "gemma3_text"}
# Gemma 3 27B scales scores by hidden / heads, unlike the other sizes. The metadata does not say so.
_GEMMA3_27B_LAYERS = 62
# A file names one to three EOS tokens. Tokens with these texts end a sequence too, in every file,
# as in llama.cpp (llama-vocab.cpp, `special_eog_ids`).
END_TOKENS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
)
# Harmony ends a message inside an answer with <|end|>, and the answer with one of these.
_HARMONY = ("<|return|>", "<|call|>")
_TOKENIZER = "tokenizer.ggml"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NO_TOKEN = 2**32 - 1  # -1 as the unsigned integer that the file stores
# Rope fields that are only supported at their defaults.
_ROPE_DEFAULTS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

Get = Callable[..., Any]  # (key, default=None) -> a field of the file's architecture


def config_from_gguf(
    fields: Mapping[str, Any],
    *,
    tensors: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None = None,
    where: str = "GGUF metadata",
) -> ModelConfig:
    """Return the `ModelConfig` of GGUF metadata.

    Args:
      fields: the metadata.
      tensors: the shapes of the file's tensors.
      rope_factors: the file's `rope_freqs.weight`, if it has one. Llama 3.1 stores the divisors
        that result from its rope scaling, and the scaling is recovered from them.
      where: the name of the file in warnings.

    Raises:
      ConfigError: missing or unsupported metadata, by name.
      CheckpointError: `rope_factors` of another scaling.
    """
    arch = str(fields.get("general.architecture"))
    if arch not in _HF_TYPES:
        raise ConfigError(
            f"GGUF architecture {arch!r}: not supported; supported are {', '.join(_HF_TYPES)}."
        )

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        return _shortest(value) if isinstance(value, float) else value

    if get("expert_count", 0):
        raise ConfigError(
            f"{arch}.expert_count={get('expert_count')}: mixture-of-experts models are not "
            "supported in GGUF files."
        )
    theta = _shortest(number(fields, f"{arch}.rope.freq_base", 10000.0))
    vocab = _vocab(fields, get("vocab_size"), tensors)

    def known(key: str, ids: Iterable[int]) -> tuple[int, ...]:
        limit = vocab if is_integer(vocab) else 0
        return ids_in_vocab(ids, limit, key=f"{_TOKENIZER}.{key}", where=where)

    as_hf = {
        "architectures": [MODEL_TYPES[_HF_TYPES[arch]]],
        "vocab_size": vocab,
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": get("attention.key_length") or _hidden_per_head(get),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(get, theta, rope_factors),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": next(
            iter(known("bos_token_id", _listed_ids(fields, "bos_token_id"))), None
        ),
        "eos_token_id": [
            token for key, ids in end_token_sources(fields).items() for token in known(key, ids)
        ],
    }
    if arch == "gemma3":
        as_hf |= _gemma3_entries(get)
    config = config_from_hf({key: value for key, value in as_hf.items() if value is not None})
    if (rotated := get("rope.dimension_count", config.head_dim)) != config.head_dim:
        raise ConfigError(
            f"{arch}.rope.dimension_count={rotated}: must be the head_dim, {config.head_dim}."
        )
    if (value_dim := get("attention.value_length", config.head_dim)) != config.head_dim:
        raise ConfigError(
            f"{arch}.attention.value_length={value_dim}: must be the key length, {config.head_dim}."
        )
    return dataclasses.replace(config, o_bias="blk.0.attn_output.bias" in tensors)


def _shortest(value: float) -> float:
    """Return the shortest decimal of a float32: 1e-06 for 9.99999997e-07."""
    return float(str(np.float32(value)))


def _vocab(fields: Mapping[str, Any], vocab: Any, tensors: Mapping[str, tuple[int, ...]]) -> Any:
    """Return the number of rows of the embeddings, else of tokens in the metadata."""
    if shape := tensors.get("token_embd.weight"):
        return shape[0]
    tokens = fields.get("tokenizer.ggml.tokens")
    return vocab or (len(tokens) if isinstance(tokens, list) else None)


def _hidden_per_head(get: Get) -> int | None:
    """Return hidden / heads, or None if either is missing or invalid."""
    hidden = get("embedding_length")
    heads = get("attention.head_count")
    return hidden // heads if is_integer(hidden) and is_integer(heads) and heads > 0 else None


def end_token_sources(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the end-of-sequence tokens of a file by the key of `tokenizer.ggml` that names them.

    Tokens that are known by their text are under `tokens`.
    """
    sources = {key: _listed_ids(fields, key) for key in _END_KEYS}
    tokens = fields.get(f"{_TOKENIZER}.tokens")
    if isinstance(tokens, list):
        known = {text: tokens.index(text) for text in END_TOKENS if text in tokens}
        if any(text in known for text in _HARMONY):
            known.pop("<|end|>", None)
        sources["tokens"] = tuple(known.values())
    return {key: found for key, found in sources.items() if found}


def _listed_ids(fields: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return the id under a key of the tokenizer, if there is one."""
    value = fields.get(f"{_TOKENIZER}.{key}")
    if value is None or value == _NO_TOKEN:
        return ()
    if not is_integer(value):
        raise ConfigError(f"{_TOKENIZER}.{key}={value!r}: must be a token id.")
    return (value,)


def _gemma3_entries(get: Get) -> dict[str, Any]:
    """Return the entries that Gemma 3 has in addition to Llama's.

    Files without the rope of windowed layers or the layer pattern get the family's defaults.
    """
    window = get("attention.sliding_window")
    pattern = get("attention.sliding_window_pattern")
    is_27b = get("block_count") == _GEMMA3_27B_LAYERS
    scalar = _hidden_per_head(get) if is_27b else get("attention.key_length")
    entries = {
        "sliding_window": window or None,
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": get("rope.freq_base_swa"),
        "query_pre_attn_scalar": scalar or _hidden_per_head(get),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    if not window:
        return entries | {"sliding_window_pattern": 1}
    if isinstance(pattern, list):
        types = [SLIDING if slides else FULL for slides in pattern]
        return entries | {"sliding_window_pattern": None, "layer_types": types}
    return entries


def _rope_scaling(get: Get, theta: float, factors: np.ndarray | None) -> dict[str, Any] | None:
    """Return `rope_scaling`. The default type is linear, and a factor of 0 means none."""
    if factors is not None:
        return llama3_scaling(factors, theta)
    kind = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear")) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    for key, default in _ROPE_DEFAULTS.items():
        if get(key, default) != default:
            raise ConfigError(f"{key}={get(key)}: only {default} is supported.")
    entries = {
        "rope_type": kind,
        "factor": factor,
        ORIGINAL: get("rope.scaling.original_context_length"),
        "attention_factor": get("rope.scaling.yarn_attn_factor"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
    }
    return {key: value for key, value in entries.items() if value is not None}


def llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Return the `rope_scaling` of these frequency divisors, float32 `[head_dim / 2]`.

    Llama 3.1 to 3.3 have low and high factors 1 and 4 over 8192 positions, and only differ in
    `factor`, the largest divisor. The scaling is evaluated and must reproduce every divisor.

    Raises:
      CheckpointError: the divisors are of another scaling.
    """
    factors = np.asarray(factors, np.float64)
    factor = float(factors.max())
    low, high, original = 1.0, 4.0, 8192
    half = len(factors)
    wavelength = 2 * math.pi * theta ** (np.arange(half) / half)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(expected, factors, rtol=1e-4):
        raise CheckpointError(
            "rope_freqs.weight is not Llama 3.1's scaling (low 1, high 4, over 8192 positions): "
            "this RoPE scaling is not supported in GGUF files; load the Hugging Face folder "
            "instead."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        ORIGINAL: original,
    }
