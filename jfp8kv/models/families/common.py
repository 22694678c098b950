"""What the families share: sizes, types of layers, windows, and the checks that hold for every decoder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ExpertsConfig, ModelConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import FULL, SLIDING, ropes
from jfp8kv.models.quantization import declared_kv_dtype

STRETCHING = (
    "linear",
    "dynamic",
    "yarn",
)  # RoPE kinds whose factor says how far beyond `max_position_embeddings` they reach


def llama_like(
    d: Fields,
    architecture: str,
    *,
    max_len: int = 2048,
    theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = False,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    layer_types: Sequence[str] = (),
    activation_key: str = "hidden_act",
    activation: str = "silu",
    **rest: Any,
) -> ModelConfig:
    """The fields that most families spell as Llama does. Arguments are the family's defaults; `rest` overrides what is read.

    `head_dim`: the family's own default; None follows from the width. `layer_types`: for ropes that differ by type of layer.
    """
    hidden, q_heads = f.count(d, "hidden_size"), f.count(d, "num_attention_heads")
    head_dim = f.count(d, "head_dim", head_dim or hidden // q_heads)
    max_len = f.count(d, "max_position_embeddings", max_len)
    layers = f.count(d, "num_hidden_layers")
    if "ropes" not in rest:
        rest["ropes"], rest["layer_ropes"] = ropes(
            d, layer_types or (FULL,) * layers, head_dim=head_dim, max_len=max_len, theta=theta
        )
    config = ModelConfig(
        architecture=architecture,
        vocab=f.count(d, "vocab_size"),
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=f.count(
            d, "num_key_value_heads", q_heads if "num_key_value_heads" in d else kv_heads or q_heads
        ),
        head_dim=head_dim,
        mlp_hidden=f.count(d, "intermediate_size"),
        max_len=reach(rest["ropes"], max_len),
        norm_eps=f.number(d, "rms_norm_eps") if "rms_norm_eps" in d else norm_eps,
        activation=f.activation(d.get(activation_key) or activation, activation_key),
        tied_embeddings=f.flag(d, "tie_word_embeddings", tied),
        bos_id=f.one_id(d, "bos_token_id"),
        eos_ids=f.ids(d.get("eos_token_id")),
        dtype=f.dtype(d),
        kv_cache_dtype=declared_kv_dtype(f.mapping(d, "quantization_config")),
    )
    return checked(dataclasses.replace(config, **rest))


def reach(ropes: Sequence[Any], max_len: int) -> int:
    """The longest text: what the config says, or further where the RoPE's scaling was made to go beyond it."""
    lengths = [max_len]
    for rope in ropes:
        if rope.kind in STRETCHING:
            lengths.append(
                int(rope.factor * (rope.original_max_len if rope.kind == "yarn" else max_len))
            )
    return max(lengths)


def layer_types(d: Fields, layers: int, default: Sequence[str]) -> list[str]:
    """The type of attention of every layer, "full_attention" or "sliding_attention"."""
    found = f.by_layer(d, "layer_types", layers) or list(default)
    for kind in found:
        if kind not in (FULL, SLIDING):
            raise ConfigError(
                f"layer_types has {kind!r} in the model's config: supported are {FULL!r} and {SLIDING!r}."
            )
    return found


def every(pattern: int, layers: int) -> list[str]:
    """Sliding windows on all layers but each `pattern`-th."""
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]


def windows(kinds: Sequence[str], window: int | None) -> tuple[int, ...]:
    """The window of each layer, () where no layer has one."""
    found = tuple(window or 0 if kind == SLIDING else 0 for kind in kinds)
    return found if any(found) else ()


def sliding_window(d: Fields, default: int | None = None) -> int | None:
    """`sliding_window`, tokens; None where the config says null."""
    return (
        default
        if "sliding_window" not in d
        else None
        if d["sliding_window"] is None
        else f.count(d, "sliding_window")
    )


def uniform_windows(d: Fields, window: int | None) -> tuple[int, ...]:
    """The same window on every layer, or ()."""
    return (window,) * f.count(d, "num_hidden_layers") if window else ()


def experts(
    d: Fields, *, hidden_key: str, count: int, top_k: int, hidden: int | None = None, **rest: Any
) -> ExpertsConfig | None:
    """A mixture of experts on the layers that `decoder_sparse_step` and `mlp_only_layers` leave it; None if that is none."""
    total = f.count(d, "num_hidden_layers")
    step, dense = f.count(d, "decoder_sparse_step", 1), d.get("mlp_only_layers") or []
    layers = tuple(i for i in range(total) if i not in dense and (i + 1) % step == 0)
    key = (
        "num_local_experts" if "num_local_experts" in d else "num_experts"
    )  # two spellings of one field
    size, chosen = f.count(d, key, count), f.count(d, "num_experts_per_tok", top_k)
    if chosen > size:
        raise ConfigError(
            f"num_experts_per_tok={chosen}, {key}={size}: a token cannot go to more experts than there are."
        )
    if not layers:
        return None
    return ExpertsConfig(
        count=size, top_k=chosen, hidden=f.count(d, hidden_key, hidden), layers=layers, **rest
    )


def checked(config: ModelConfig) -> ModelConfig:
    """The same config, or a `ConfigError` for sizes that cannot make a decoder."""
    if config.q_heads % config.kv_heads:
        raise ConfigError(
            f"num_attention_heads={config.q_heads}, num_key_value_heads={config.kv_heads}: the first must be a "
            "multiple of the second."
        )
    if len({rope.rotated(config.head_dim) for rope in config.ropes}) > 1:
        raise ConfigError(
            "rope_parameters in the model's config: all layers must rotate the same share of a head."
        )
    return config
