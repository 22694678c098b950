"""The decoder's building blocks as Flax NNX modules. Each holds its parameter of *all* layers and is called with a layer index.

Weights lie `[layers, out, in]`, as checkpoints have them; 16-bit ones may be replaced by their bits (models/linear.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import Activation
from jfp8kv.models.linear import stacked_matmul, widen

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
FLOAT32 = np.dtype(np.float32)
Layer = Int[Array, ""] | int


class Linear(nnx.Module):
    """`x @ weight[layer].T + bias[layer]`, accumulated in float32, returned in `x.dtype`. `tiled`: see models/linear.py."""

    def __init__(self, layers: int, out: int, width: int, *, bias: bool, dtype: np.dtype, tiled: bool, rngs: nnx.Rngs):
        weight = jax.random.normal(rngs.params(), (layers, out, width), jnp.float32) * width**-0.5
        self.weight = nnx.Param(weight.astype(dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((layers, out), dtype))
        self.has_bias = bias
        self.stored = np.dtype(dtype)
        self.tiled = tiled

    def __call__(self, x: Float[Array, "tokens in"], layer: Layer) -> Float[Array, "tokens out"]:
        y = stacked_matmul(x, self.weight[...], layer, stored=self.stored, tiled=self.tiled)
        if self.has_bias:
            y = y + widen(self.bias[...][layer], self.stored, FLOAT32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (Zhang and Sennrich 2019, arXiv:1910.07467), returned in `x.dtype`.

    `layers=None` is a single norm, called without a layer.
    """

    def __init__(self, layers: int | None, width: int, *, eps: float, dtype: np.dtype):
        self.weight = nnx.Param(jnp.ones((width,) if layers is None else (layers, width), dtype))
        self.eps = eps
        self.stored = np.dtype(dtype)

    def __call__(self, x: Float[Array, "tokens hidden"], layer: Layer | None = None) -> Float[Array, "tokens hidden"]:
        weight = self.weight[...] if layer is None else self.weight[...][layer]
        wide = x.astype(jnp.float32)
        norm = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (norm * widen(weight, self.stored, FLOAT32)).astype(x.dtype)


class Table(nnx.Module):
    """A `[vocab, hidden]` matrix: read by rows to embed tokens, multiplied by to score them."""

    def __init__(self, vocab: int, hidden: int, *, dtype: np.dtype, tiled: bool, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (vocab, hidden), jnp.float32).astype(dtype))
        self.stored = np.dtype(dtype)
        self.tiled = tiled

    def rows(self, tokens: Int[Array, " tokens"], dtype: np.dtype) -> Float[Array, "tokens hidden"]:
        """The rows of these token ids. Ids past the end (padding) give the last row."""
        return widen(self.weight[...].at[tokens].get(mode="clip"), self.stored, dtype)

    def scores(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """`x @ weight.T`, in float32."""
        return stacked_matmul(x, self.weight[...][None], 0, stored=self.stored, tiled=self.tiled)


def gated(kind: Activation, gate: Float[Array, "tokens mlp"], up: Float[Array, "tokens mlp"]) -> Float[Array, "tokens mlp"]:
    """`activation(gate) * up` (Shazeer 2020, arXiv:2002.05202), in float32, returned in `up.dtype`."""
    return (ACTIVATIONS[kind](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)
