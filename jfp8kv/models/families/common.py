"""Readers that families share: Llama's fields, layer types, windows, mixtures of experts."""

from collections.abc import Sequence

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ExpertsConfig, ModelConfig, RopeConfig
from jfp8kv.models.families import fields as f
from jfp8kv.models.families.fields import Fields
from jfp8kv.models.families.ropes import FULL, SLIDING, LayerRopes, Ropes, read_ropes
from jfp8kv.models.quantization import declared_kv_dtype

# RoPE kinds whose factor extends the context beyond `max_position_embeddings`.
EXTENDING = ("linear", "dynamic", "yarn")


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
    ropes: tuple[Ropes, LayerRopes] | None = None,
) -> ModelConfig:
    """Return a config with the fields that most families spell as Llama does.

    Args:
      max_len, theta, norm_eps, tied, head_dim, kv_heads, activation: the family's defaults. Without
        a `head_dim` the default is hidden / heads; without `kv_heads`, as many as query heads.
      layer_types: the type of each layer, if ropes depend on it.
      ropes: the ropes and each layer's index, for families with their own spelling.

    Raises:
      ConfigError: a missing or invalid field.
    """
    hidden = f.count(d, "hidden_size")
    q_heads = f.count(d, "num_attention_heads")
    head_dim = f.count(d, "head_dim", head_dim or hidden // q_heads)
    max_len = f.count(d, "max_position_embeddings", max_len)
    layers = f.count(d, "num_hidden_layers")
    vocab = f.count(d, "vocab_size")
    # A null `num_key_value_heads` means as many as query heads, not the family's default.
    default_kv_heads = q_heads if "num_key_value_heads" in d else kv_heads or q_heads
    if ropes is None:
        types = layer_types or (FULL,) * layers
        ropes = read_ropes(d, types, head_dim=head_dim, max_len=max_len, theta=theta)
    config = ModelConfig(
        architecture=architecture,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=f.count(d, "num_key_value_heads", default_kv_heads),
        head_dim=head_dim,
        mlp_hidden=f.count(d, "intermediate_size"),
        max_len=extended_max_len(ropes[0], max_len),
        norm_eps=f.number(d, "rms_norm_eps") if "rms_norm_eps" in d else norm_eps,
        activation=f.activation(d.get(activation_key) or activation, activation_key),
        ropes=ropes[0],
        layer_ropes=ropes[1],
        tied_embeddings=f.flag(d, "tie_word_embeddings", tied),
        bos_id=f.token_id(d, "bos_token_id", vocab),
        eos_ids=f.eos_ids(d, vocab),
        dtype=f.dtype(d),
        kv_cache_dtype=declared_kv_dtype(f.mapping(d, "quantization_config")),
    )
    return require_valid(config)


def extended_max_len(ropes: Sequence[RopeConfig], max_len: int) -> int:
    """Return the longest sequence: `max_len`, or more if a rope's scaling extends it."""
    lengths = [max_len]
    for rope in ropes:
        if rope.kind in EXTENDING:
            base = rope.original_max_len if rope.kind == "yarn" else max_len
            lengths.append(int(rope.factor * base))
    return max(lengths)


def read_layer_types(d: Fields, layers: int, default: Sequence[str]) -> list[str]:
    """Return "full_attention" or "sliding_attention" for every layer."""
    types = f.by_layer(d, "layer_types", layers) or list(default)
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise ConfigError(
                f"layer_types has {kind!r} in the model's config: supported are {FULL!r} and "
                f"{SLIDING!r}."
            )
    return types


def alternating(period: int, layers: int) -> list[str]:
    """Return layer types with full attention on every `period`-th layer, and windows on others."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def windows(layer_types: Sequence[str], window: int | None) -> tuple[int, ...]:
    """Return the window of each layer; () if no layer has one."""
    by_layer = tuple(window or 0 if kind == SLIDING else 0 for kind in layer_types)
    return by_layer if any(by_layer) else ()


def sliding_window(d: Fields, default: int | None = None) -> int | None:
    """Return `sliding_window` in tokens, None for null; `default` if the field is missing."""
    if "sliding_window" not in d:
        return default
    return None if d["sliding_window"] is None else f.count(d, "sliding_window")


def uniform_windows(d: Fields, window: int | None) -> tuple[int, ...]:
    """Return the same window for every layer, or () for None."""
    return (window,) * f.count(d, "num_hidden_layers") if window else ()


def read_experts(
    d: Fields, *, hidden_key: str, count: int, top_k: int, hidden: int | None = None
) -> ExpertsConfig | None:
    """Return the mixture of experts, or None if all layers are dense.

    `decoder_sparse_step` and `mlp_only_layers` say which layers are dense.

    Args:
      hidden_key: the field with the width of an expert.
      count, top_k, hidden: the family's defaults.
    """
    step = f.count(d, "decoder_sparse_step", 1)
    dense = d.get("mlp_only_layers") or []
    layers = tuple(
        layer
        for layer in range(f.count(d, "num_hidden_layers"))
        if layer not in dense and (layer + 1) % step == 0
    )
    key = "num_local_experts" if "num_local_experts" in d else "num_experts"
    experts = f.count(d, key, count)
    chosen = f.count(d, "num_experts_per_tok", top_k)
    if chosen > experts:
        raise ConfigError(
            f"num_experts_per_tok={chosen}, {key}={experts}: the first must be at most the second."
        )
    if not layers:
        return None
    return ExpertsConfig(
        count=experts, top_k=chosen, hidden=f.count(d, hidden_key, hidden), layers=layers
    )


def require_valid(config: ModelConfig) -> ModelConfig:
    """Return the config. Raises `ConfigError` for sizes that contradict each other."""
    if config.q_heads % config.kv_heads:
        raise ConfigError(
            f"num_attention_heads={config.q_heads}, num_key_value_heads={config.kv_heads}: the "
            "first must be a multiple of the second."
        )
    if len({rope.rotated(config.head_dim) for rope in config.ropes}) > 1:
        raise ConfigError(
            "rope_parameters in the model's config: all layers must rotate the same share of a "
            "head."
        )
    return config
