"""From a `ModelConfig` back to the `config.json` of its architecture.

Every family is one function again, the inverse of its reader beside this file. What is written is read back before it is given
away, so what an architecture's config cannot say (a window on one layer of a Llama) is refused by name, never dropped.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import MODEL_TYPES, config_from_hf
from jfp8kv.models.families.ropes_to_hf import (
    gemma3_ropes,
    kinds_of_layers,
    one_rope,
    phi3_rope,
    positions,
)

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_TYPES = {architecture: model_type for model_type, architecture in MODEL_TYPES.items()}
_Written = dict[str, Any]


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of this model, as a dict: `config_from_hf` makes the same `ModelConfig` of it.

    Old and new spellings stand beside each other where readers differ (`torch_dtype` and `dtype`, `rope_scaling` and
    `rope_parameters`). What the checkpoint declares for its KV cache is left out: it is said beside the scales.

    Raises:
      ConfigError: an architecture that has no config of its own, or a setting that its config cannot say, by name.
    """
    if config.architecture not in _WRITERS:
        raise ConfigError(
            f"architecture={config.architecture!r}: has no config.json here; supported are {', '.join(_WRITERS)}."
        )
    written = _WRITERS[config.architecture](config)
    _require_same(config, written)
    return written


def _require_same(config: ModelConfig, written: _Written) -> None:
    wanted = dataclasses.replace(config, kv_cache_dtype=None)
    try:
        found = config_from_hf(written)
    except ConfigError as error:
        raise ConfigError(
            f"a {config.architecture} with this ModelConfig has no config.json that can be read: {error}"
        ) from error
    fields = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if fields:
        told = ", ".join(f"{name}={getattr(wanted, name)!r}" for name in fields)
        raise ConfigError(
            f"the config.json of a {config.architecture} cannot say {told}: only models of the shape of that architecture can "
            "be written as one. jfp8kv.save keeps any."
        )


def _common(c: ModelConfig) -> _Written:
    """What every family spells alike."""
    return {
        "architectures": [c.architecture],
        "model_type": _TYPES[c.architecture],
        "vocab_size": c.vocab,
        "tie_word_embeddings": c.tied_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": None
        if not c.eos_ids
        else c.eos_ids[0]
        if len(c.eos_ids) == 1
        else list(c.eos_ids),
        "dtype": c.dtype,
        "torch_dtype": c.dtype,
    }


def _llama_like(c: ModelConfig, **rest: Any) -> _Written:
    """The fields that most families spell as Llama does."""
    sizes = {
        "hidden_size": c.hidden,
        "intermediate_size": c.mlp_hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.q_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": positions(c),
        "rms_norm_eps": c.norm_eps,
        "hidden_act": _ACTIVATIONS[c.activation],
    }
    return _common(c) | sizes | one_rope(c) | rest


def _biases(c: ModelConfig) -> _Written:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _window(c: ModelConfig) -> int | None:
    """Tokens of the windows, or None."""
    return next((window for window in c.windows if window), None)


def _layer_types(c: ModelConfig) -> _Written:
    return {"layer_types": kinds_of_layers(c), "sliding_window": _window(c)}


def _switched(c: ModelConfig) -> _Written:
    """Windows behind a switch; `max_window_layers` for readers that know no list of types: layers from there on slide."""
    first = next((layer for layer in range(c.layers) if c.window(layer)), c.layers)
    return {"use_sliding_window": bool(c.windows), "max_window_layers": first}


def _llama(c: ModelConfig) -> _Written:
    return _llama_like(c, **_biases(c))


def _one_window(c: ModelConfig, **rest: Any) -> _Written:
    """Mistral and others that have the same window on every layer, or none."""
    return _llama_like(c, sliding_window=_window(c), **rest)


def _phi3(c: ModelConfig) -> _Written:
    return _one_window(c, **phi3_rope(c))


def _smollm3(c: ModelConfig) -> _Written:
    rotates = [int(c.rope(layer) is not None) for layer in range(c.layers)]
    return _llama_like(
        c,
        no_rope_layers=rotates,
        use_sliding_window=bool(c.windows),
        **_layer_types(c),
        **_biases(c),
    )


def _olmo2(c: ModelConfig) -> _Written:
    return _llama_like(c, attention_bias=c.qkv_bias)


def _granite(c: ModelConfig) -> _Written:
    return _llama_like(
        c,
        embedding_multiplier=c.embedding_scale,
        residual_multiplier=c.residual_scale,
        attention_multiplier=c.attention_scale,
        logits_scaling=_undone(c.logit_scale, lambda scaling: 1.0 / scaling, 1.0 / c.logit_scale),
        **_biases(c),
    )


def _qwen2(c: ModelConfig) -> _Written:
    return _llama_like(c, **_layer_types(c), **_switched(c))


def _qwen3(c: ModelConfig) -> _Written:
    return _qwen2(c) | {"attention_bias": c.qkv_bias}


def _qwen2_moe(c: ModelConfig) -> _Written:
    shared = {"shared_expert_intermediate_size": c.experts.shared_hidden} if c.experts else {}
    last = max(
        (layer + 1 for layer in range(c.layers) if c.window(layer)), default=c.layers
    )  # layers before it slide
    return (
        _qwen2(c) | {"qkv_bias": c.qkv_bias, "max_window_layers": last} | shared | _qwen_experts(c)
    )


def _qwen3_moe(c: ModelConfig) -> _Written:
    return _one_window(c, attention_bias=c.qkv_bias, **_switched(c), **_qwen_experts(c))


def _qwen_experts(c: ModelConfig) -> _Written:
    """The experts, and the layers that have none."""
    dense: _Written = {"decoder_sparse_step": 1, "mlp_only_layers": list(c.dense_layers)}
    if (e := c.experts) is None:
        return dense
    sizes = {
        "num_experts": e.count,
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.hidden,
    }
    return dense | sizes | {"norm_topk_prob": e.normalized}


def _local_experts(c: ModelConfig) -> _Written:
    """Mixtral's and gpt-oss's words for them; their width is the MLP's."""
    return (
        {"num_local_experts": c.experts.count, "num_experts_per_tok": c.experts.top_k}
        if c.experts
        else {}
    )


def _mixtral(c: ModelConfig) -> _Written:
    return _one_window(c, **_local_experts(c))


def _gpt_oss(c: ModelConfig) -> _Written:
    gate = {"swiglu_alpha": c.experts.alpha, "swiglu_limit": c.experts.limit} if c.experts else {}
    return _llama_like(c, attention_bias=c.qkv_bias, **_layer_types(c), **_local_experts(c), **gate)


def _gemma(c: ModelConfig) -> _Written:
    return _llama_like(c, hidden_activation=_ACTIVATIONS[c.activation], attention_bias=c.qkv_bias)


def _gemma2(c: ModelConfig, **rest: Any) -> _Written:
    query = _undone(c.attention_scale, lambda scalar: scalar**-0.5, c.attention_scale**-2)
    caps = {"attn_logit_softcapping": c.softcap, "final_logit_softcapping": c.logit_softcap}
    return _gemma(c) | _layer_types(c) | caps | {"query_pre_attn_scalar": query} | rest


def _gemma3(c: ModelConfig) -> _Written:
    return _gemma2(
        c, max_position_embeddings=c.max_len, use_bidirectional_attention=False, **gemma3_ropes(c)
    )


def _gpt2(c: ModelConfig) -> _Written:
    return _common(c) | {
        "n_embd": c.hidden,
        "n_layer": c.layers,
        "n_head": c.q_heads,
        "n_inner": c.mlp_hidden,
        "n_positions": c.max_len,
        "n_ctx": c.max_len,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new"
        if c.activation == "gelu_tanh"
        else _ACTIVATIONS[c.activation],
        "scale_attn_weights": c.sm_scale is None,
        "scale_attn_by_inverse_layer_idx": c.scale_by_layer,
    }


def _undone(value: float, do: Callable[[float], float], near: float) -> int | float:
    """The plainest number from which `do` makes exactly `value`, near `near`; that itself where there is none."""
    tried = (
        *(round(near, digits) for digits in (0, 3, 6, 9)),
        near,
        math.nextafter(near, 0),
        math.nextafter(near, math.inf),
    )
    found = next((number for number in tried if number > 0 and do(number) == value), near)
    return int(found) if found == int(found) else found


_WRITERS: dict[str, Callable[[ModelConfig], _Written]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _one_window,
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
