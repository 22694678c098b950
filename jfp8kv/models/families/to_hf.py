"""Convert a `ModelConfig` to the `config.json` of its architecture.

Every family is one function, the inverse of its reader. The result is read back before it is
returned, so a setting that an architecture's config cannot express (a window on one layer of a
Llama) is refused by name, never dropped.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import MODEL_TYPES, config_from_hf
from jfp8kv.models.families.ropes_to_hf import (
    gemma3_rope_fields,
    layer_types_of,
    max_positions,
    phi3_rope_fields,
    rope_fields,
)

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_TYPES = {architecture: model_type for model_type, architecture in MODEL_TYPES.items()}
HFConfig = dict[str, Any]


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of a model as a dict, from which `config_from_hf` returns `config`.

    Both spellings are written where readers differ (`torch_dtype` and `dtype`, `rope_scaling` and
    `rope_parameters`). `kv_cache_dtype` is not written: `export` declares it with the scales.

    Raises:
      ConfigError: an architecture without a writer, or a setting that its config cannot express.
    """
    if config.architecture not in _WRITERS:
        raise ConfigError(
            f"architecture={config.architecture!r}: cannot be written as a config.json; supported "
            f"are {', '.join(_WRITERS)}."
        )
    hf_config = _WRITERS[config.architecture](config)
    _require_round_trip(config, hf_config)
    return hf_config


def _require_round_trip(config: ModelConfig, hf_config: HFConfig) -> None:
    expected = dataclasses.replace(config, kv_cache_dtype=None)
    try:
        found = config_from_hf(hf_config)
    except ConfigError as error:
        raise ConfigError(
            f"a {config.architecture} with this ModelConfig has no readable config.json: {error}"
        ) from error
    lost = [
        f"{field.name}={getattr(expected, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(expected, field.name) != getattr(found, field.name)
    ]
    if lost:
        raise ConfigError(
            f"the config.json of a {config.architecture} cannot express {', '.join(lost)}: only "
            "models with the structure of that architecture can be written. jfp8kv.save writes any "
            "model."
        )


def _common(config: ModelConfig) -> HFConfig:
    """Return the fields that every family spells the same."""
    eos: int | list[int] | None = list(config.eos_ids) or None
    if len(config.eos_ids) == 1:
        eos = config.eos_ids[0]
    return {
        "architectures": [config.architecture],
        "model_type": _TYPES[config.architecture],
        "vocab_size": config.vocab,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }


def _llama_like(config: ModelConfig) -> HFConfig:
    """Return the fields that most families spell as Llama does."""
    sizes = {
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max_positions(config),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATIONS[config.activation],
    }
    return _common(config) | sizes | rope_fields(config)


def _attention_bias(config: ModelConfig) -> HFConfig:
    return {"attention_bias": config.qkv_bias}


def _biases(config: ModelConfig) -> HFConfig:
    return _attention_bias(config) | {"mlp_bias": config.mlp_bias}


def _window(config: ModelConfig) -> int | None:
    """Return the size of the windows in tokens, or None."""
    return next((window for window in config.windows if window), None)


def _layer_types(config: ModelConfig) -> HFConfig:
    return {"layer_types": layer_types_of(config), "sliding_window": _window(config)}


def _window_switch(config: ModelConfig) -> HFConfig:
    """Return the switch for windows.

    Readers without `layer_types` take all layers from `max_window_layers` on as sliding.
    """
    first = next((layer for layer in range(config.layers) if config.window(layer)), config.layers)
    return {"use_sliding_window": bool(config.windows), "max_window_layers": first}


def _llama(config: ModelConfig) -> HFConfig:
    return _llama_like(config) | _biases(config)


def _uniform_window(config: ModelConfig) -> HFConfig:
    """Return the config of Mistral and others with the same window on every layer, or none."""
    return _llama_like(config) | {"sliding_window": _window(config)}


def _phi3(config: ModelConfig) -> HFConfig:
    return _uniform_window(config) | phi3_rope_fields(config)


def _smollm3(config: ModelConfig) -> HFConfig:
    own = {
        "no_rope_layers": [int(config.rope(layer) is not None) for layer in range(config.layers)],
        "use_sliding_window": bool(config.windows),
    }
    return _llama_like(config) | own | _layer_types(config) | _biases(config)


def _olmo2(config: ModelConfig) -> HFConfig:
    return _llama_like(config) | _attention_bias(config)


def _granite(config: ModelConfig) -> HFConfig:
    scale = config.logit_scale
    multipliers = {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": _solve(lambda scaling: 1.0 / scaling, scale, 1.0 / scale),
    }
    return _llama_like(config) | multipliers | _biases(config)


def _qwen2(config: ModelConfig) -> HFConfig:
    return _llama_like(config) | _layer_types(config) | _window_switch(config)


def _qwen3(config: ModelConfig) -> HFConfig:
    return _qwen2(config) | _attention_bias(config)


def _qwen2_moe(config: ModelConfig) -> HFConfig:
    experts = config.experts
    shared = {"shared_expert_intermediate_size": experts.shared_hidden} if experts else {}
    # Layers before `max_window_layers` slide.
    sliding = [layer + 1 for layer in range(config.layers) if config.window(layer)]
    limit = max(sliding, default=config.layers)
    own = {"qkv_bias": config.qkv_bias, "max_window_layers": limit}
    return _qwen2(config) | own | shared | _qwen_experts(config)


def _qwen3_moe(config: ModelConfig) -> HFConfig:
    switch = _window_switch(config)
    return _uniform_window(config) | _attention_bias(config) | switch | _qwen_experts(config)


def _qwen_experts(config: ModelConfig) -> HFConfig:
    """Return the experts, and the layers without experts."""
    dense: HFConfig = {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    experts = config.experts
    if experts is None:
        return dense
    return dense | {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.hidden,
        "norm_topk_prob": experts.normalized,
    }


def _local_experts(config: ModelConfig) -> HFConfig:
    """Return the experts as Mixtral and gpt-oss spell them. Their width is that of the MLP."""
    experts = config.experts
    if experts is None:
        return {}
    return {"num_local_experts": experts.count, "num_experts_per_tok": experts.top_k}


def _mixtral(config: ModelConfig) -> HFConfig:
    return _uniform_window(config) | _local_experts(config)


def _gpt_oss(config: ModelConfig) -> HFConfig:
    experts = config.experts
    gate = {"swiglu_alpha": experts.alpha, "swiglu_limit": experts.limit} if experts else {}
    attention = _attention_bias(config) | _layer_types(config)
    return _llama_like(config) | attention | _local_experts(config) | gate


def _gemma(config: ModelConfig) -> HFConfig:
    activation = {"hidden_activation": _ACTIVATIONS[config.activation]}
    return _llama_like(config) | activation | _attention_bias(config)


def _gemma2(config: ModelConfig) -> HFConfig:
    scale = config.attention_scale
    own = {
        "attn_logit_softcapping": config.softcap,
        "final_logit_softcapping": config.logit_softcap,
        "query_pre_attn_scalar": _solve(lambda scalar: scalar**-0.5, scale, scale**-2),
    }
    return _gemma(config) | _layer_types(config) | own


def _gemma3(config: ModelConfig) -> HFConfig:
    own = {"max_position_embeddings": config.max_len, "use_bidirectional_attention": False}
    return _gemma2(config) | own | gemma3_rope_fields(config)


def _gpt2(config: ModelConfig) -> HFConfig:
    is_tanh = config.activation == "gelu_tanh"
    return _common(config) | {
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.q_heads,
        "n_inner": config.mlp_hidden,
        "n_positions": config.max_len,
        "n_ctx": config.max_len,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if is_tanh else _ACTIVATIONS[config.activation],
        "scale_attn_weights": config.sm_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }


def _solve(function: Callable[[float], float], value: float, guess: float) -> int | float:
    """Return the shortest decimal `x` near `guess` with `function(x) == value`, else `guess`."""
    candidates = (
        *(round(guess, digits) for digits in (0, 3, 6, 9)),
        guess,
        math.nextafter(guess, 0),
        math.nextafter(guess, math.inf),
    )
    exact = (x for x in candidates if x > 0 and function(x) == value)
    solution = next(exact, guess)
    return int(solution) if solution == int(solution) else solution


_WRITERS: dict[str, Callable[[ModelConfig], HFConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _uniform_window,
    "SmolLM3ForCausalLM": _smollm3,
    "Phi3ForCausalLM": _phi3,
    "Olmo2ForCausalLM": _olmo2,
    "GraniteForCausalLM": _granite,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
    "GptOssForCausalLM": _gpt_oss,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GPT2LMHeadModel": _gpt2,
}
