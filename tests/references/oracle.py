"""A Llama forward pass that can be checked by eye, with a hook where keys and values are stored.

Everything here is plain NumPy in float64: no cache, no batching, no pages, one loop over layers and
one over heads. It reads a Hugging Face folder by itself and shares no code with the library, so
that agreement means something.

    logits = forward(folder, tokens)                     # full precision
    logits = forward(folder, tokens, fp8_store("e4m3"))  # keys and values in FP8, scale 1
    ids    = greedy(folder, tokens, 24, fp8_store("e5m2", dynamic=True))

`store(x, layer, which)` receives the keys after RoPE (`which="k"`) or the values (`which="v"`) of
one layer, float64 `[tokens, kv_heads, head_dim]`, and returns what attention reads back. A token
also reads its own stored key and value, so running all tokens at once gives what a cache filled one
token at a time gives.

RoPE follows Su et al. 2021 (arXiv:2104.09864) in the half-split layout; its "llama3" scaling is
that of Llama 3.1.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

Store = Callable[[np.ndarray, int, str], np.ndarray]
Weights = dict[str, np.ndarray]

FORMATS = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


# --- reading the folder --------------------------------------------------------------------------


def read(folder: str | Path) -> tuple[dict[str, Any], Weights]:
    """`config.json` as it stands, and every tensor of every safetensors file as float64."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {
            name: np.asarray(tensor, np.float64) for name, tensor in load_file(file).items()
        }
    return config, weights


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE settings of `rope_parameters`, or of `rope_theta` and `rope_scaling`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    found["rope_theta"] = found.get("rope_theta", config.get("rope_theta", 10000.0))
    return found


# --- parts ----------------------------------------------------------------------------------


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    """`x @ W.T + b`; the bias only where the checkpoint has one."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope_frequencies(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Radians per position of each of the `head_dim / 2` rotated pairs."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = (
            rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        )  # over the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip(
            (turns - low) / (high - low), 0, 1
        )  # 0: slow pairs, interpolated; 1: fast pairs, left alone
        return keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    raise ValueError(
        f"rope_type={rope['rope_type']!r}: the oracle knows 'default', 'linear' and 'llama3'."
    )


def rotate(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotate the pairs (x[d], x[d + head_dim / 2]) of token t by `t * frequencies[d]`."""
    angle = np.arange(len(x))[:, None, None] * frequencies
    first, second = np.split(x, 2, axis=-1)
    turned = [
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    ]
    return np.concatenate(turned, axis=-1)


def activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    if name == "gelu_pytorch_tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    raise ValueError(
        f"hidden_act={name!r}: the oracle knows 'silu', 'gelu' and 'gelu_pytorch_tanh'."
    )


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return causal attention, `[tokens, q_heads * head_dim]`."""
    tokens, q_heads, head_dim = q.shape
    group = q_heads // k.shape[1]
    future = np.triu(np.ones((tokens, tokens), bool), k=1)
    out = np.empty_like(q)
    for head in range(q_heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(head_dim)
        scores[future] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, head // group]
    return out.reshape(tokens, q_heads * head_dim)


# --- the model -----------------------------------------------------------------------------------


def forward(
    folder: str | Path, tokens: Sequence[int] | np.ndarray, store: Store | None = None
) -> np.ndarray:
    """Return logits `[tokens, vocab]` in float64. `store=None` leaves keys and values exact."""
    return _forward(*read(folder), np.asarray(tokens), store)


def greedy(
    folder: str | Path, tokens: Sequence[int] | np.ndarray, n: int, store: Store | None = None
) -> list[int]:
    """Return `n` greedy ids after `tokens`. End-of-text ids do not end the sequence."""
    config, weights = read(folder)
    ids = [int(token) for token in tokens]
    for _ in range(n):
        ids.append(int(_forward(config, weights, np.asarray(ids), store)[-1].argmax()))
    return ids[len(tokens) :]


def _forward(
    config: dict[str, Any], weights: Weights, tokens: np.ndarray, store: Store | None
) -> np.ndarray:
    q_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or q_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // q_heads
    eps = config["rms_norm_eps"]
    frequencies = rope_frequencies(rope_parameters(config), head_dim)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}"
        h = rms_norm(x, weights[f"{here}.input_layernorm.weight"], eps)
        q = linear(h, weights, f"{here}.self_attn.q_proj").reshape(-1, q_heads, head_dim)
        k = linear(h, weights, f"{here}.self_attn.k_proj").reshape(-1, kv_heads, head_dim)
        v = linear(h, weights, f"{here}.self_attn.v_proj").reshape(-1, kv_heads, head_dim)
        q, k = rotate(q, frequencies), rotate(k, frequencies)
        if store is not None:
            k, v = store(k, layer, "k"), store(v, layer, "v")
        x = x + linear(causal_attention(q, k, v), weights, f"{here}.self_attn.o_proj")

        h = rms_norm(x, weights[f"{here}.post_attention_layernorm.weight"], eps)
        gate = activation(config["hidden_act"], linear(h, weights, f"{here}.mlp.gate_proj"))
        x = x + linear(
            gate * linear(h, weights, f"{here}.mlp.up_proj"), weights, f"{here}.mlp.down_proj"
        )

    x = rms_norm(x, weights["model.norm.weight"], eps)
    tied = config.get("tie_word_embeddings", False)
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


# --- storing in FP8 ------------------------------------------------------------------------------


def fp8_store(
    fmt: str,
    k_scales: np.ndarray | None = None,
    v_scales: np.ndarray | None = None,
    dynamic: bool = False,
) -> Store:
    """A store that rounds through FP8: `fmt` is "e4m3" (float8_e4m3fn) or "e5m2".

    `k_scales` and `v_scales` broadcast to `[layers, kv_heads, head_dim]` (a number, per tensor,
    head or channel); None is scale 1. `dynamic=True` gives every token and head its own scale
    instead, see `token_head_scales`. Source of the formats: OCP 8-bit Floating Point Specification
    1.0.
    """
    if fmt not in FORMATS:
        raise ValueError(f"fmt={fmt!r}: must be one of {sorted(FORMATS)}.")
    if dynamic and not (k_scales is None and v_scales is None):
        raise ValueError("dynamic=True computes its own scales: leave k_scales and v_scales out.")

    def store(x: np.ndarray, layer: int, which: str) -> np.ndarray:
        scale = (
            token_head_scales(x, fmt)
            if dynamic
            else _layer_scale({"k": k_scales, "v": v_scales}[which], layer)
        )
        return through_fp8(x, scale, fmt)

    return store


def through_fp8(x: np.ndarray, scale: np.ndarray, fmt: str) -> np.ndarray:
    """Quantize and dequantize `x`: divide by `scale`, clip, round to nearest even, multiply.

    The division and the product are in float32, as in a cache that is fed float32 keys and values.
    """
    dtype, largest = FORMATS[fmt]
    stored = np.clip(
        x.astype(np.float32) / scale, np.float32(-largest), np.float32(largest)
    ).astype(dtype)
    return (stored.astype(np.float32) * scale).astype(np.float64)


def token_head_scales(x: np.ndarray, fmt: str) -> np.ndarray:
    """Return one float32 scale per token and head, the smallest sufficient power of two.

    A token and head that is all zero gets scale 1 (any would do).
    """
    ratio = (
        np.abs(x.astype(np.float32)).max(axis=-1, keepdims=True).astype(np.float64)
        / FORMATS[fmt][1]
    )
    exponent = np.ceil(np.log2(np.where(ratio == 0, 1, ratio)))
    return np.exp2(exponent).astype(np.float32)


def _layer_scale(scales: np.ndarray | float | None, layer: int) -> np.ndarray:
    """The float32 `[kv_heads or 1, head_dim or 1]` scales of one layer."""
    if scales is None:
        return np.ones((1, 1), np.float32)
    scales = np.asarray(scales, np.float32)
    scales = scales.reshape((1,) * (3 - scales.ndim) + scales.shape)
    return scales[layer if len(scales) > 1 else 0]
