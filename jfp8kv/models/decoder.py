"""The decoder: one Flax NNX module for every family, called on the tokens of one request.

It knows nothing of caches. Attention is a function it is given: `attend(layer, q, k, v, carry) -> (out, carry)`, with q and k
already rotated. The engine passes one over pages, calibration one that watches, tests a plain one.

Layers run under `lax.scan` with their parameters stacked, so a model of 80 layers traces and compiles like one of 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jfp8kv.core.platform import activation_dtype
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.layers import Linear, RMSNorm, Table, gated
from jfp8kv.models.rope import angles, rotate

Attend = Callable[..., tuple[Array, Any]]


class Layers(nnx.Module):
    """The parameters of all layers, and one layer's computation."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, tiled: bool, rngs: nnx.Rngs):
        c = config

        def linear(out: int, width: int, bias: bool) -> Linear:
            return Linear(c.layers, out, width, bias=bias, dtype=dtype, tiled=tiled, rngs=rngs)

        self.attention_norm = RMSNorm(c.layers, c.hidden, eps=c.norm_eps, dtype=dtype)
        self.q = linear(c.q_heads * c.head_dim, c.hidden, c.qkv_bias)
        self.k = linear(c.kv_heads * c.head_dim, c.hidden, c.qkv_bias)
        self.v = linear(c.kv_heads * c.head_dim, c.hidden, c.qkv_bias)
        self.o = linear(c.hidden, c.q_heads * c.head_dim, c.o_bias)
        self.mlp_norm = RMSNorm(c.layers, c.hidden, eps=c.norm_eps, dtype=dtype)
        self.gate = linear(c.mlp_hidden, c.hidden, c.mlp_bias)
        self.up = linear(c.mlp_hidden, c.hidden, c.mlp_bias)
        self.down = linear(c.hidden, c.mlp_hidden, c.mlp_bias)
        self.config = config

    def __call__(self, layer: Int[Array, ""], x: Array, rotation: tuple, attend: Attend, carry: Any) -> tuple[Array, Any]:
        c, tokens = self.config, x.shape[0]
        y = self.attention_norm(x, layer)
        q = rotate(self.q(y, layer).reshape(tokens, c.q_heads, c.head_dim), rotation)
        k = rotate(self.k(y, layer).reshape(tokens, c.kv_heads, c.head_dim), rotation)
        v = self.v(y, layer).reshape(tokens, c.kv_heads, c.head_dim)
        out, carry = attend(layer, q, k, v, carry)
        x = x + self.o(out.reshape(tokens, -1), layer)
        y = self.mlp_norm(x, layer)
        return x + self.down(gated(c.activation, self.gate(y, layer), self.up(y, layer)), layer), carry


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters have the names and shapes of `models.names`.

    `dtype` is the weights'; activations are kept in `activation_dtype(dtype)`. `Decoder(config)` draws random weights, mostly
    for tests; `bind` makes one from a tree of arrays.
    """

    def __init__(self, config: ModelConfig, *, dtype: np.dtype | None = None, rngs: nnx.Rngs | None = None):
        dtype, rngs = np.dtype(dtype or jnp.dtype(config.dtype)), rngs or nnx.Rngs(0)
        tiled = jax.default_backend() == "cpu"
        self.embed = Table(config.vocab, config.hidden, dtype=dtype, tiled=tiled, rngs=rngs)
        self.layers = Layers(config, dtype=dtype, tiled=tiled, rngs=rngs)
        self.norm = RMSNorm(None, config.hidden, eps=config.norm_eps, dtype=dtype)
        if not config.tied_embeddings:
            self.head = Table(config.vocab, config.hidden, dtype=dtype, tiled=tiled, rngs=rngs)
        self.config = config
        self.compute = activation_dtype(dtype)

    def __call__(
        self, tokens: Int[Array, " tokens"], positions: Int[Array, " tokens"], *, attend: Attend, carry: Any
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Hidden states after the final norm, and what `attend` made of `carry`."""
        rotation = angles(self.config.rope, self.config.head_dim, positions)

        def body(state: tuple[Array, Any], layer: Array) -> tuple[tuple[Array, Any], None]:
            x, carry = state
            return self.layers(layer, x, rotation, attend, carry), None

        start = self.embed.rows(tokens, self.compute), carry
        (x, carry), _ = lax.scan(body, start, jnp.arange(self.config.layers, dtype=jnp.int32))
        return self.norm(x), carry

    def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """Scores of every token id, float32."""
        return (self.embed if self.config.tied_embeddings else self.head).scores(hidden)


def bind(config: ModelConfig, tree: Any, dtype: np.dtype) -> Decoder:
    """The decoder around a tree of arrays with the native names; `dtype` is the type that 16-bit bits stand for."""
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)
