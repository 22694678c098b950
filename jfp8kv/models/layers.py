"""The decoder's building blocks as Flax NNX modules. Each holds its parameter of *all* layers and is called with a layer index.

Weights lie `[layers, out, in]`, as checkpoints have them; 16-bit ones may be replaced by their bits (models/linear.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import Activation
from jfp8kv.models.config import Norm as NormKind
from jfp8kv.models.linear import Matmul, stacked_matmul, widen

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

    def __init__(
        self,
        layers: int,
        out: int,
        width: int,
        *,
        bias: bool,
        dtype: np.dtype,
        tiled: bool,
        rngs: nnx.Rngs,
        matmul: Matmul = stacked_matmul,
    ):
        weight = jax.random.normal(rngs.params(), (layers, out, width), jnp.float32) * width**-0.5
        self.weight = nnx.Param(weight.astype(dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((layers, out), dtype))
        self.has_bias = bias
        self.stored = np.dtype(dtype)
        self.tiled = tiled
        self.matmul = matmul

    def __call__(self, x: Float[Array, "tokens in"], layer: Layer) -> Float[Array, "tokens out"]:
        y = self.matmul(x, self.weight[...], layer, stored=self.stored, tiled=self.tiled)
        if self.has_bias:
            y = y + widen(self.bias[...][layer], self.stored, FLOAT32)
        return y.astype(x.dtype)


class Norm(nnx.Module):
    """A norm over the last axis in float32, returned in `x.dtype`. `layers=None` is a single norm, called without a layer.

    "rms": root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), "rms_plus_one" multiplies by `1 + weight`; "layer"
    subtracts the mean, divides by the standard deviation and adds a bias (Ba et al. 2016, arXiv:1607.06450).
    """

    def __init__(
        self, layers: int | None, width: int, *, kind: NormKind, eps: float, dtype: np.dtype
    ):
        shape = (width,) if layers is None else (layers, width)
        self.weight = nnx.Param(jnp.full(shape, 0 if kind == "rms_plus_one" else 1, dtype))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape, dtype))
        self.kind = kind
        self.eps = eps
        self.stored = np.dtype(dtype)

    def __call__(
        self, x: Float[Array, "*rows width"], layer: Layer | None = None
    ) -> Float[Array, "*rows width"]:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self._read(self.weight, layer)
        normed = normed * (weight + 1.0 if self.kind == "rms_plus_one" else weight)
        return (normed + self._read(self.bias, layer) if self.kind == "layer" else normed).astype(
            x.dtype
        )

    def _read(self, parameter: nnx.Param, layer: Layer | None) -> Float[Array, " width"]:
        value = parameter[...] if layer is None else parameter[...][layer]
        return widen(value, self.stored, FLOAT32)


class Table(nnx.Module):
    """A `[vocab, hidden]` matrix: read by rows to embed tokens, multiplied by to score them."""

    def __init__(self, vocab: int, hidden: int, *, dtype: np.dtype, tiled: bool, rngs: nnx.Rngs):
        self.weight = nnx.Param(
            jax.random.normal(rngs.params(), (vocab, hidden), jnp.float32).astype(dtype)
        )
        self.stored = np.dtype(dtype)
        self.tiled = tiled

    def rows(self, tokens: Int[Array, " tokens"], dtype: np.dtype) -> Float[Array, "tokens hidden"]:
        """The rows of these token ids. Ids past the end (padding) give the last row."""
        return widen(self.weight[...].at[tokens].get(mode="clip"), self.stored, dtype)

    def scores(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """`x @ weight.T`, in float32."""
        return stacked_matmul(x, self.weight[...][None], 0, stored=self.stored, tiled=self.tiled)


def activate(kind: Activation, x: Float[Array, "tokens mlp"]) -> Float[Array, "tokens mlp"]:
    """`activation(x)`, in float32, returned in `x.dtype`."""
    return ACTIVATIONS[kind](x.astype(jnp.float32)).astype(x.dtype)


def gated(
    kind: Activation, gate: Float[Array, "tokens mlp"], up: Float[Array, "tokens mlp"]
) -> Float[Array, "tokens mlp"]:
    """`activation(gate) * up` (Shazeer 2020, arXiv:2002.05202), in float32, returned in `up.dtype`."""
    return (ACTIVATIONS[kind](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)
