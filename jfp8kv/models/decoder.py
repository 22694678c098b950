"""The decoder: one Flax NNX module for every family, called on the tokens of one request.

It knows nothing of caches. Attention is a function it is given: `attend(layer, q, k, v, carry) -> (out, carry)`, with q and k
already normed and rotated. The engine passes one over pages, calibration one that watches, tests a plain one.

Layers run under `lax.scan` with their parameters stacked, so a model of 80 layers traces and compiles like one of 2. Where
layers differ (windows, rotations, experts) they read their entry of a small array by their index.
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
from jfp8kv.models.layers import FLOAT32, Linear, Norm, Table, activate, gated
from jfp8kv.models.linear import Matmul, stacked_matmul, widen
from jfp8kv.models.rope import AllAngles, angles, layer_angles, rotate

Attend = Callable[..., tuple[Array, Any]]
Layer = Int[Array, ""]


class Layers(nnx.Module):
    """The parameters of all layers, and one layer's computation."""

    def __init__(
        self, config: ModelConfig, *, dtype: np.dtype, tiled: bool, rngs: nnx.Rngs, matmul: Matmul
    ):
        c, dense = config, len(config.dense_layers)

        def linear(out: int, width: int, bias: bool, layers: int = c.layers) -> Linear:
            return Linear(
                layers, out, width, bias=bias, dtype=dtype, tiled=tiled, rngs=rngs, matmul=matmul
            )

        def norm(width: int = c.hidden) -> Norm:
            return Norm(c.layers, width, kind=c.norm, eps=c.norm_eps, dtype=dtype)

        if c.pre_norm:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        if c.qk_norm:
            heads = {"head": (1, 1), "row": (c.q_heads, c.kv_heads)}[c.qk_norm]
            self.q_norm, self.k_norm = (norm(h * c.head_dim) for h in heads)
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
        y, carry = self._attention(
            layer, self.attention_norm(x, layer) if c.pre_norm else x, rotations, attend, carry
        )
        x = self._added(x, self.attention_post_norm(y, layer) if c.post_norm else y)
        y = self._mlp(layer, self.mlp_norm(x, layer) if c.pre_norm else x, real)
        return self._added(x, self.mlp_post_norm(y, layer) if c.post_norm else y), carry

    def _added(self, x: Array, y: Array) -> Array:
        scale = self.config.residual_scale
        return x + (y if scale == 1.0 else y * jnp.asarray(scale, y.dtype))

    def _attention(
        self, layer: Layer, x: Array, rotations: AllAngles | None, attend: Attend, carry: Any
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        c, tokens = self.config, x.shape[0]
        q, k = self.q(x, layer), self.k(x, layer)
        if c.qk_norm == "row":
            q, k = self.q_norm(q, layer), self.k_norm(k, layer)
        q, k = q.reshape(tokens, c.q_heads, c.head_dim), k.reshape(tokens, c.kv_heads, c.head_dim)
        if c.qk_norm == "head":
            q, k = self.q_norm(q, layer), self.k_norm(k, layer)
        if rotations is not None:
            rotation = layer_angles(c, rotations, layer)
            q, k = rotate(q, rotation), rotate(k, rotation)
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
        of_experts = np.isin(np.arange(c.layers), c.experts.layers)
        slots = (
            np.where(of_experts, np.cumsum(of_experts), np.cumsum(~of_experts)) - 1
        )  # a layer's place among its kind
        slot = jnp.asarray(slots, jnp.int32)[layer]
        return lax.cond(
            jnp.asarray(of_experts)[layer],
            lambda: self.experts(x, slot, real),
            lambda: self._dense(slot, x),
        )

    def _dense(self, slot: Layer, x: Array) -> Array:
        c = self.config
        up = self.up(x, slot)
        return self.down(
            gated(c.activation, self.gate(x, slot), up)
            if c.gated_mlp
            else activate(c.activation, up),
            slot,
        )


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters have the names and shapes of `models.names`.

    `dtype` is the weights'; activations are kept in `activation_dtype(dtype)`. `Decoder(config)` draws random weights, mostly
    for tests; `bind` makes one from a tree of arrays.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: np.dtype | None = None,
        rngs: nnx.Rngs | None = None,
        matmul: Matmul = stacked_matmul,
    ):
        dtype, rngs = np.dtype(dtype or jnp.dtype(config.dtype)), rngs or nnx.Rngs(0)
        tiled = jax.default_backend() == "cpu"

        def table(rows: int) -> Table:
            return Table(rows, config.hidden, dtype=dtype, tiled=tiled, rngs=rngs)

        self.embed = table(config.vocab)
        if config.learned_positions:
            self.positions = table(config.max_len)
        self.layers = Layers(config, dtype=dtype, tiled=tiled, rngs=rngs, matmul=matmul)
        self.norm = Norm(None, config.hidden, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        if not config.tied_embeddings:
            self.head = table(config.vocab)
        self.config = config
        self.stored = dtype
        self.compute = activation_dtype(dtype)

    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        *,
        attend: Attend,
        carry: Any,
        context: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Hidden states after the final norm, and what `attend` made of `carry`.

        `context` is how many tokens the text had when its cache was begun (models/rope.py); None: these are all of them.
        """
        c = self.config
        context = jnp.max(positions) + 1 if context is None else context
        rotations = angles(c, positions, context) if c.ropes else None
        real = tokens < c.vocab

        def body(state: tuple[Array, Any], layer: Array) -> tuple[tuple[Array, Any], None]:
            x, carry = state
            return self.layers(layer, x, rotations, real, attend, carry), None

        start = self._embedded(tokens, positions), carry
        (x, carry), _ = lax.scan(body, start, jnp.arange(c.layers, dtype=jnp.int32))
        return self.norm(x), carry

    def _embedded(
        self, tokens: Int[Array, " tokens"], positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens hidden"]:
        x = self.embed.rows(tokens, self.compute)
        if self.config.embedding_scale != 1.0:
            scale = np.asarray(
                self.config.embedding_scale, self.stored
            )  # rounded as the weights are: models are trained so
            x = x * jnp.asarray(scale, self.compute)
        return (
            x + self.positions.rows(positions, self.compute) if self.config.learned_positions else x
        )

    def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """Scores of every token id, float32."""
        c = self.config
        scores = (self.embed if c.tied_embeddings else self.head).scores(hidden) * c.logit_scale
        return (
            scores
            if c.logit_softcap is None
            else c.logit_softcap * jnp.tanh(scores / c.logit_softcap)
        )

    def sinks(self) -> Float[Array, "layers q_heads"] | None:
        """The attention sinks of every layer, float32, or None."""
        return widen(self.layers.sinks[...], self.stored, FLOAT32) if self.config.sinks else None


def bind(
    config: ModelConfig, tree: Any, dtype: np.dtype, *, matmul: Matmul = stacked_matmul
) -> Decoder:
    """The decoder around a tree of arrays with the native names; `dtype` is the type that 16-bit bits stand for.

    `matmul` multiplies by the matrices of a layer, experts' apart.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, matmul=matmul))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)
