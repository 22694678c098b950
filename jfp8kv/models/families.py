"""From a family's own description to a `ModelConfig`.

Every family is one function here, listed under the architecture name that Hugging Face puts in `config.json`. It
reads a plain dict, so old and new spellings (`rope_scaling` and `rope_theta`, or `rope_parameters`; `torch_dtype`, or
`dtype`) end in the same place. GGUF metadata is first rewritten into that dict: a family is described once. What a
family asks for and the decoder cannot do is refused by name, never approximated.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from jfp8kv.core.errors import CheckpointError, ConfigError, nearest
from jfp8kv.models.config import Activation, ModelConfig, RopeConfig
from jfp8kv.models.quantization import declared_kv_dtype

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_KINDS = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16")


def config_from_hf(d: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from a `config.json`, as a dict.

    Raises:
      ConfigError: an architecture, activation, RoPE type or size that is missing or not supported, naming it and what
      is.
      CheckpointError: quantized weights.
    """
    return FAMILIES[_architecture(d)](d)


def _architecture(d: Mapping[str, Any]) -> str:
    model_type = str(d.get("model_type") or "none given")
    listed = d.get("architectures") or MODEL_TYPES.get(model_type, model_type)
    names = [str(name) for name in (listed if isinstance(listed, list | tuple) else [listed])]
    for name in names:
        if name in FAMILIES:
            return name
    given = ", ".join(names)
    raise ConfigError(f"architecture {given}: not supported; supported are {', '.join(FAMILIES)}.{nearest(given, FAMILIES)}")


def _llama(d: Mapping[str, Any]) -> ModelConfig:
    """Llama 1 to 3 and what has their shape, such as SmolLM2 and TinyLlama. One bias switch covers q, k, v and o."""
    hidden, q_heads = _count(d, "hidden_size"), _count(d, "num_attention_heads")
    bias = bool(d.get("attention_bias", False))
    return checked(
        ModelConfig(
            architecture="LlamaForCausalLM",
            vocab=_count(d, "vocab_size"),
            hidden=hidden,
            layers=_count(d, "num_hidden_layers"),
            q_heads=q_heads,
            kv_heads=_count(d, "num_key_value_heads", q_heads),
            head_dim=_count(d, "head_dim", hidden // q_heads),
            mlp_hidden=_count(d, "intermediate_size"),
            max_len=_count(d, "max_position_embeddings", 2048),
            norm_eps=_number(d, "rms_norm_eps", 1e-6),
            activation=_activation(d.get("hidden_act", "silu")),
            rope=_rope(d),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(d.get("mlp_bias", False)),
            tied_embeddings=bool(d.get("tie_word_embeddings", False)),
            bos_id=_one_id(d, "bos_token_id"),
            eos_ids=ids(d.get("eos_token_id")),
            dtype=_dtype(d),
            kv_cache_dtype=declared_kv_dtype(_mapping(d, "quantization_config")),
        )
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {"LlamaForCausalLM": _llama}
MODEL_TYPES = {"llama": "LlamaForCausalLM"}  # Hugging Face's `model_type` and GGUF's `general.architecture`


def checked(config: ModelConfig) -> ModelConfig:
    """The same config, or a `ConfigError` for sizes that cannot make a decoder."""
    if config.q_heads % config.kv_heads:
        raise ConfigError(
            f"num_attention_heads={config.q_heads}, num_key_value_heads={config.kv_heads}: the first must be a "
            "multiple of the second."
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim={config.head_dim}: rotary embeddings need an even number.")
    return config


def ids(value: Any) -> tuple[int, ...]:
    """An `eos_token_id`, which is one token id, several or none, as a tuple without repeats; `ConfigError` otherwise."""
    if value is None:
        return ()
    listed = value if isinstance(value, list | tuple) else [value]
    if not all(_whole(token) for token in listed):
        raise ConfigError(f"eos_token_id={value!r} in the model's config: must be a token id, or a list of them.")
    return tuple(dict.fromkeys(listed))


def _one_id(d: Mapping[str, Any], key: str) -> int | None:
    value = d.get(key)
    if value is not None and not _whole(value):
        raise ConfigError(f"{key}={value!r} in the model's config: must be a token id.")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(d: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = d.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"the model's config has no {key}: it must be a positive integer.")
    if not _whole(value) or value < 1:
        raise ConfigError(f"{key}={value!r} in the model's config: must be a positive integer.")
    return value


def _number(d: Mapping[str, Any], key: str, default: float | None = None, why: str = "in the model's config") -> float:
    value = d.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r} {why}: must be a positive number.")
    return float(value)


def _mapping(d: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = d.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} in the model's config: must be a mapping, or null.")
    return value


def _activation(name: Any) -> Activation:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={name!r}: not supported; supported are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _dtype(d: Mapping[str, Any]) -> str:
    name = str(d.get("dtype") or d.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} in the model's config: not supported; supported are {', '.join(DTYPES)}.")
    return name


def _rope(d: Mapping[str, Any]) -> RopeConfig:
    given = {**_mapping(d, "rope_scaling"), **_mapping(d, "rope_parameters")}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_type={kind!r}: not supported; supported are {', '.join(ROPE_KINDS)}.")
    if (share := given.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={share}: only 1.0, rotating the whole head, is supported.")
    theta = _number(d if given.get("rope_theta") is None else given, "rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    why = f"for rope_type {kind!r}"
    factor = _number(given, "factor", why=why)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=_number(given, "low_freq_factor", why=why),
        high_freq_factor=_number(given, "high_freq_factor", why=why),
        original_max_len=int(_number(given, "original_max_position_embeddings", why=why)),
    )


def config_from_gguf(
    fields: Mapping[str, Any], *, tensors: Collection[str], rope_factors: np.ndarray | None = None
) -> ModelConfig:
    """A `ModelConfig` from GGUF metadata and the names of the file's tensors.

    `rope_factors` is the file's `rope_freqs.weight` if it has one: Llama 3.1 stores the result of its frequency
    interpolation, from which the rule is read back. Sources: the GGUF specification (ggml), gguf's `constants.py`.
    """
    arch = str(fields.get("general.architecture"))
    if arch not in MODEL_TYPES:
        raise ConfigError(f"GGUF architecture {arch!r}: not supported; supported are {', '.join(MODEL_TYPES)}.")

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{key}", default)

    if get("expert_count", 0):
        raise ConfigError(f"{arch}.expert_count={get('expert_count')}: mixture-of-experts models are not supported.")
    theta = _number(fields, f"{arch}.rope.freq_base", 10000.0)
    tokens = fields.get("tokenizer.ggml.tokens")
    as_hf = {
        "architectures": [MODEL_TYPES[arch]],
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
        "rope_parameters": _gguf_rope(get, theta, rope_factors),
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
    config = config_from_hf(as_hf)
    if (rotated := get("rope.dimension_count", config.head_dim)) != config.head_dim:
        raise ConfigError(f"{arch}.rope.dimension_count={rotated}: must be the whole head_dim, {config.head_dim}.")
    if (value_dim := get("attention.value_length", config.head_dim)) != config.head_dim:
        raise ConfigError(f"{arch}.attention.value_length={value_dim}: must be the keys' length, {config.head_dim}.")
    return dataclasses.replace(config, o_bias="blk.0.attn_output.bias" in tensors)


def _gguf_rope(get: Callable[..., Any], theta: float, factors: np.ndarray | None) -> dict[str, Any] | None:
    if factors is not None:
        return llama3_rule(factors, theta)
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if kind == "none" and get("rope.scale_linear") is None:
        return None
    return {"rope_type": "linear" if kind == "none" else kind, "factor": factor}


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
