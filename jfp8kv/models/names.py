"""The name and shape of every parameter, ours and theirs.

`expected_shapes` is the one place that says which parameters a `ModelConfig` has. Our tree is small because the
layers are stacked: `layers.q.weight` holds the query projection of every layer, `[layers, out, in]`. Files name each
layer's tensor by itself; `HF_MODULES` and `GGUF_MODULES` translate, one row per module, with `{}` where the layer
number goes. A row a model does not have (a bias, a head of its own) is simply not asked for.
"""

from collections.abc import Collection, Mapping

from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig

Shape = tuple[int, ...]

LAYERS = "layers."

# Hugging Face module paths without the leading "model.", which bare decoders leave out.
HF_MODULES = {
    "embed": "embed_tokens",
    "layers.attention_norm": "layers.{}.input_layernorm",
    "layers.q": "layers.{}.self_attn.q_proj",
    "layers.k": "layers.{}.self_attn.k_proj",
    "layers.v": "layers.{}.self_attn.v_proj",
    "layers.o": "layers.{}.self_attn.o_proj",
    "layers.mlp_norm": "layers.{}.post_attention_layernorm",
    "layers.gate": "layers.{}.mlp.gate_proj",
    "layers.up": "layers.{}.mlp.up_proj",
    "layers.down": "layers.{}.mlp.down_proj",
    "norm": "norm",
    "head": "lm_head",
}

GGUF_MODULES = {
    "embed": "token_embd",
    "layers.attention_norm": "blk.{}.attn_norm",
    "layers.q": "blk.{}.attn_q",
    "layers.k": "blk.{}.attn_k",
    "layers.v": "blk.{}.attn_v",
    "layers.o": "blk.{}.attn_output",
    "layers.mlp_norm": "blk.{}.ffn_norm",
    "layers.gate": "blk.{}.ffn_gate",
    "layers.up": "blk.{}.ffn_up",
    "layers.down": "blk.{}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Native name -> shape of every parameter of a model: weights `[out, in]`, `layers.*` stacked on a leading axis."""
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, mlp = config.hidden, config.mlp_hidden
    linears = {
        "q": (q, hidden, config.qkv_bias),
        "k": (kv, hidden, config.qkv_bias),
        "v": (kv, hidden, config.qkv_bias),
        "o": (hidden, q, config.o_bias),
        "gate": (mlp, hidden, config.mlp_bias),
        "up": (mlp, hidden, config.mlp_bias),
        "down": (hidden, mlp, config.mlp_bias),
    }
    shapes: dict[str, Shape] = {"embed.weight": (config.vocab, hidden)}
    for norm in ("attention_norm", "mlp_norm"):
        shapes[f"layers.{norm}.weight"] = (config.layers, hidden)
    for name, (out, into, bias) in linears.items():
        shapes[f"layers.{name}.weight"] = (config.layers, out, into)
        if bias:
            shapes[f"layers.{name}.bias"] = (config.layers, out)
    shapes["norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["head.weight"] = (config.vocab, hidden)
    return shapes


def their_names(ours: str, modules: Mapping[str, str], layers: int) -> list[str]:
    """The tensors that make up one native parameter, in layer order; a single name for what is not stacked."""
    module, leaf = ours.rsplit(".", 1)
    path = modules[module]
    count = layers if ours.startswith(LAYERS) else 1
    return [f"{path.format(layer)}.{leaf}" for layer in range(count)]


def require_names(found: Collection[str], expected: Mapping[str, Shape], *, where: str) -> None:
    """Check that `found` is exactly the names of `expected`.

    Raises:
      CheckpointError: names the first missing or unexpected parameters, and the shape a missing one should have.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    if missing:
        hint = ""
        if all(name.startswith(("head.", "lm_head.", "output.")) for name in missing):
            hint = " If the model ties its output to its embeddings, its config must say so (tie_word_embeddings)."
        raise CheckpointError(f"{where}: {_some(missing, 'missing')}.{hint}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        hint = ""
        if any(name.endswith((".bias", "lm_head.weight", "head.weight")) for name in unexpected):
            hint = " Biases and an output head are read when the config declares them."
        raise CheckpointError(f"{where}: {_some(unexpected, 'not part of this architecture')}.{hint}")


def require_shape(name: str, found: Shape, expected: Shape, *, where: str) -> None:
    """Raise a `CheckpointError` naming the parameter and both shapes unless they agree."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{where}: {name} has shape {list(found)}, expected {list(expected)} by the model's config.")


def nest(flat: Mapping[str, object]) -> dict:
    """`{"a.b": x}` -> `{"a": {"b": x}}`."""
    tree: dict = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def _some(names: list[str], what: str) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} {what}: {shown}"
