"""The decoder: one Flax NNX module for all families, called on the tokens of one request.

The decoder does not depend on the KV cache. It receives attention as a function:
`attend(layer, q, k, v, carry) -> (out, carry)`, with q and k normed and rotated. The engine passes
paged attention, calibration passes a function that observes keys and values, and tests pass plain
attention.

Layers run under `lax.scan` with stacked parameters, so a model of 80 layers traces and compiles
like a model of 2. If layers differ (windows, RoPE, experts), the body indexes small arrays by
layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jfp8kv.core.platform import activation_dtype
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.experts import Experts
from jfp8kv.models.layers import FLOAT32, Embedding, Linear, Norm, activate, gated_activation
from jfp8kv.models.linear import Matmul, stacked_matmul, widen
from jfp8kv.models.rope import AllAngles, angles, layer_angles, rotate

Attend = Callable[..., tuple[Array, Any]]
Layer = Int[Array, ""]


class Layers(nnx.Module):
    """The parameters of all layers, and the computation of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: np.dtype[Any],
        tiled: bool,
        rngs: nnx.Rngs,
        matmul: Matmul,
    ):
        c = config
        dense = len(c.dense_layers)

        def linear(out: int, width: int, bias: bool, layers: int = c.layers) -> Linear:
            return Linear(
                layers, out, width, bias=bias, dtype=dtype, tiled=tiled, rngs=rngs, matmul=matmul
            )

        def norm(width: int = c.hidden) -> Norm:
            return Norm(c.layers, width, kind=c.norm, eps=c.norm_eps, dtype=dtype)

        if c.pre_norm:
            self.attention_norm = norm()
            self.mlp_norm = norm()
        if c.post_norm:
            self.attention_post_norm = norm()
            self.mlp_post_norm = norm()
        if c.qk_norm:
            self.q_norm = norm((c.q_heads if c.qk_norm == "row" else 1) * c.head_dim)
            self.k_norm = norm((c.kv_heads if c.qk_norm == "row" else 1) * c.head_dim)
        self.q = linear(c.q_heads * c.head_dim, c.hidden, c.qkv_bias)
        self.k = linear(c.kv_heads * c.head_dim, c.hidden, c.qkv_bias)
        self.v = linear(c.kv_heads * c.head_dim, c.hidden, c.qkv_bias)
        self.o = linear(c.hidden, c.q_heads * c.head_dim, c.o_bias)
        if c.sinks:
            self.sinks = nnx.Param(jnp.zeros((c.layers, c.q_heads), dtype))
        if dense:
            if c.gated_mlp:
                self.gate = linear(c.mlp_hidden, c.hidden, c.mlp_bias, dense)
            self.up = linear(c.mlp_hidden, c.hidden, c.mlp_bias, dense)
            self.down = linear(c.hidden, c.mlp_hidden, c.mlp_bias, dense)
        if c.experts:
            self.experts = Experts(
                c.experts, c.hidden, c.activation, dtype=dtype, tiled=tiled, rngs=rngs
            )
        self.config = config

    def __call__(
        self,
        layer: Layer,
        x: Array,
        rotations: AllAngles | None,
        real: Bool[Array, " tokens"],
        attend: Attend,
        carry: Any,
    ) -> tuple[Array, Any]:
        c = self.config
        y = self.attention_norm(x, layer) if c.pre_norm else x
        y, carry = self._attention(layer, y, rotations, attend, carry)
        x = self._add(x, self.attention_post_norm(y, layer) if c.post_norm else y)
        y = self._mlp(layer, self.mlp_norm(x, layer) if c.pre_norm else x, real)
        x = self._add(x, self.mlp_post_norm(y, layer) if c.post_norm else y)
        return x, carry

    def _add(self, x: Array, y: Array) -> Array:
        """Return `x + y`: the residual stream plus the scaled output of attention or MLP."""
        scale = self.config.residual_scale
        return x + (y if scale == 1.0 else y * jnp.asarray(scale, y.dtype))

    def _attention(
        self, layer: Layer, x: Array, rotations: AllAngles | None, attend: Attend, carry: Any
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        c = self.config
        tokens = x.shape[0]
        q = self.q(x, layer)
        k = self.k(x, layer)
        if c.qk_norm == "row":
            q = self.q_norm(q, layer)
            k = self.k_norm(k, layer)
        q = q.reshape(tokens, c.q_heads, c.head_dim)
        k = k.reshape(tokens, c.kv_heads, c.head_dim)
        if c.qk_norm == "head":
            q = self.q_norm(q, layer)
            k = self.k_norm(k, layer)
        if rotations is not None:
            rotation = layer_angles(c, rotations, layer)
            q = rotate(q, rotation)
            k = rotate(k, rotation)
        if c.scale_by_layer:
            q = (q.astype(jnp.float32) / (layer + 1).astype(jnp.float32)).astype(q.dtype)
        v = self.v(x, layer).reshape(tokens, c.kv_heads, c.head_dim)
        out, carry = attend(layer, q, k, v, carry)
        return self.o(out.reshape(tokens, -1), layer), carry

    def _mlp(self, layer: Layer, x: Array, real: Bool[Array, " tokens"]) -> Array:
        c = self.config
        if c.experts is None:
            return self._dense(layer, x)
        if not c.dense_layers:
            return self.experts(x, layer, real)
        has_experts = np.isin(np.arange(c.layers), c.experts.layers)
        # Index of each layer among those with experts, or among those without.
        slots = np.where(has_experts, np.cumsum(has_experts), np.cumsum(~has_experts)) - 1
        slot = jnp.asarray(slots, jnp.int32)[layer]
        return lax.cond(
            jnp.asarray(has_experts)[layer],
            lambda: self.experts(x, slot, real),
            lambda: self._dense(slot, x),
        )

    def _dense(self, slot: Layer, x: Array) -> Array:
        c = self.config
        up = self.up(x, slot)
        if c.gated_mlp:
            inner = gated_activation(c.activation, self.gate(x, slot), up)
        else:
            inner = activate(c.activation, up)
        return self.down(inner, slot)


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters have the names and shapes of `models.names`.

    `Decoder(config)` has random weights, mostly for tests; `bind` returns one with given arrays.

    Args:
      config: of the model.
      dtype: of the weights; activations have `activation_dtype(dtype)`.
      rngs: for random weights.
      matmul: multiplies by the matrices of a layer, except those of experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: np.dtype[Any] | None = None,
        rngs: nnx.Rngs | None = None,
        matmul: Matmul = stacked_matmul,
    ):
        dtype = np.dtype(dtype or jnp.dtype(config.dtype))
        rngs = rngs or nnx.Rngs(0)
        tiled = jax.default_backend() == "cpu"

        def embedding(rows: int) -> Embedding:
            return Embedding(rows, config.hidden, dtype=dtype, tiled=tiled, rngs=rngs)

        self.embed = embedding(config.vocab)
        if config.learned_positions:
            self.positions = embedding(config.max_len)
        self.layers = Layers(config, dtype=dtype, tiled=tiled, rngs=rngs, matmul=matmul)
        self.norm = Norm(None, config.hidden, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        if not config.tied_embeddings:
            self.head = embedding(config.vocab)
        self.config = config
        self.weight_dtype = dtype
        self.activation_dtype = activation_dtype(dtype)

    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        *,
        attend: Attend,
        carry: Any,
        context: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Return the hidden states after the final norm, and the last `carry` of `attend`.

        Args:
          tokens: token ids; ids past the end of the vocabulary are padding.
          positions: of the tokens.
          attend: the attention function.
          carry: passed through `attend` of all layers.
          context: the length of the sequence when its cache was started (models/rope.py); None if
            `tokens` is the whole sequence.
        """
        c = self.config
        context = jnp.max(positions) + 1 if context is None else context
        rotations = angles(c, positions, context) if c.ropes else None
        real = tokens < c.vocab

        def body(state: tuple[Array, Any], layer: Array) -> tuple[tuple[Array, Any], None]:
            x, carry = state
            return self.layers(layer, x, rotations, real, attend, carry), None

        start = self._embed(tokens, positions), carry
        (x, carry), _ = lax.scan(body, start, jnp.arange(c.layers, dtype=jnp.int32))
        return self.norm(x), carry

    def _embed(
        self, tokens: Int[Array, " tokens"], positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens hidden"]:
        x = self.embed.lookup(tokens, self.activation_dtype)
        if self.config.embedding_scale != 1.0:
            # Rounded to the type of the weights, as in training.
            scale = np.asarray(self.config.embedding_scale, self.weight_dtype)
            x = x * jnp.asarray(scale, self.activation_dtype)
        if self.config.learned_positions:
            x = x + self.positions.lookup(positions, self.activation_dtype)
        return x

    def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """Return the logits of every token id, float32."""
        c = self.config
        head = self.embed if c.tied_embeddings else self.head
        logits = head.logits(hidden) * c.logit_scale
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits

    def sinks(self) -> Float[Array, "layers q_heads"] | None:
        """Return the attention sinks of every layer, float32, or None."""
        if not self.config.sinks:
            return None
        return widen(self.layers.sinks[...], self.weight_dtype, FLOAT32)


def bind(
    config: ModelConfig,
    tree: dict[str, Any],
    dtype: np.dtype[Any],
    *,
    matmul: Matmul = stacked_matmul,
) -> Decoder:
    """Return the decoder with the parameters in `tree`.

    Args:
      config: of the model.
      tree: nested dict of arrays, as in `Params.tree`.
      dtype: of the weights, also of those that are stored as bits.
      matmul: multiplies by the matrices of a layer, except those of experts.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, matmul=matmul))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)
