"""Model families: read a `config.json` into a `ModelConfig`.

Every family is one function, listed here under its architecture name in `config.json`. It reads a
dict, in old and new spellings (`rope_scaling` and `rope_theta`, or `rope_parameters`;
`torch_dtype`, or `dtype`). GGUF metadata is first converted to that dict (`gguf.py`), so that a
family is described once. A setting that the decoder does not support is refused by name, never
approximated.
"""

from collections.abc import Callable

from jfp8kv.core.errors import ConfigError, did_you_mean
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import gemma, llama, mixtral, qwen
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.gpt2 import gpt2

FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
    "LlamaForCausalLM": llama.llama,
    "MistralForCausalLM": llama.mistral,
    "SmolLM3ForCausalLM": llama.smollm3,
    "Phi3ForCausalLM": llama.phi3,
    "Olmo2ForCausalLM": llama.olmo2,
    "GraniteForCausalLM": llama.granite,
    "Qwen2ForCausalLM": qwen.qwen2,
    "Qwen3ForCausalLM": qwen.qwen3,
    "Qwen2MoeForCausalLM": qwen.qwen2_moe,
    "Qwen3MoeForCausalLM": qwen.qwen3_moe,
    "MixtralForCausalLM": mixtral.mixtral,
    "GptOssForCausalLM": mixtral.gpt_oss,
    "GemmaForCausalLM": gemma.gemma,
    "Gemma2ForCausalLM": gemma.gemma2,
    "Gemma3ForCausalLM": gemma.gemma3,
    "Gemma3ForConditionalGeneration": gemma.gemma3_multimodal,
    "GPT2LMHeadModel": gpt2,
}
# By Hugging Face's `model_type`, for configs without an architecture.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
}


def config_from_hf(d: Fields) -> ModelConfig:
    """Return the `ModelConfig` of a `config.json`, given as a dict.

    Raises:
      ConfigError: a missing or unsupported architecture, activation, RoPE type or size, with the
        supported ones.
      CheckpointError: a malformed quantization_config.
    """
    return FAMILIES[_architecture(d)](d)


def _architecture(d: Fields) -> str:
    model_type = str(d.get("model_type") or "(none)")
    listed = d.get("architectures") or MODEL_TYPES.get(model_type, model_type)
    names = [str(name) for name in (listed if isinstance(listed, list | tuple) else [listed])]
    for name in names:
        if name in FAMILIES:
            return name
    given = ", ".join(names)
    raise ConfigError(
        f"architecture {given}: not supported; supported are {', '.join(FAMILIES)}."
        f"{did_you_mean(given, FAMILIES)}"
    )
