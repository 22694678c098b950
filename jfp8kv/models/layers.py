"""Building blocks of the decoder, as Flax NNX modules.

Each module has its parameter for *all* layers and is called with a layer index. Weights are stored
as `[layers, out, in]`, as in checkpoints. 16-bit weights may be stored as bits (models/linear.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jfp8kv.models.config import Activation
from jfp8kv.models.config import Norm as NormKind
from jfp8kv.models.linear import Matmul, stacked_matmul, widen

FLOAT32 = np.dtype(np.float32)
Layer = Int[Array, ""] | int


class Linear(nnx.Module):
    """`x @ weight[layer].T + bias[layer]`, accumulated in float32, returned in `x.dtype`.

    Args:
      layers: number of layers.
      out, width: sizes of the output and the input.
      bias: whether there is a bias.
      dtype: of the weights.
      tiled: read weights tile by tile (models/linear.py).
      rngs: for random weights.
      matmul: multiplies by the weights of a layer.
    """

    def __init__(
        self,
        layers: int,
        out: int,
        width: int,
        *,
        bias: bool,
        dtype: np.dtype[Any],
        tiled: bool,
        rngs: nnx.Rngs,
        matmul: Matmul = stacked_matmul,
    ):
        weight = jax.random.normal(rngs.params(), (layers, out, width), jnp.float32) * width**-0.5
        self.weight = nnx.Param(weight.astype(dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((layers, out), dtype))
        self.has_bias = bias
        self.weight_dtype = np.dtype(dtype)
        self.tiled = tiled
        self.matmul = matmul

    def __call__(self, x: Float[Array, "tokens in"], layer: Layer) -> Float[Array, "tokens out"]:
        y = self.matmul(
            x, self.weight[...], layer, weight_dtype=self.weight_dtype, tiled=self.tiled
        )
        if self.has_bias:
            y = y + widen(self.bias[...][layer], self.weight_dtype, FLOAT32)
        return y.astype(x.dtype)


class Norm(nnx.Module):
    """A norm over the last axis, computed in float32 and returned in `x.dtype`.

    "rms" is the root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), "rms_plus_one"
    multiplies by `1 + weight`. "layer" subtracts the mean, divides by the standard deviation and
    adds a bias (Ba et al. 2016, arXiv:1607.06450). `layers=None` is a single norm, called without a
    layer.
    """

    def __init__(
        self, layers: int | None, width: int, *, kind: NormKind, eps: float, dtype: np.dtype[Any]
    ):
        shape = (width,) if layers is None else (layers, width)
        self.weight = nnx.Param(jnp.full(shape, 0 if kind == "rms_plus_one" else 1, dtype))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape, dtype))
        self.kind = kind
        self.eps = eps
        self.weight_dtype = np.dtype(dtype)

    def __call__(
        self, x: Float[Array, "*rows width"], layer: Layer | None = None
    ) -> Float[Array, "*rows width"]:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self._of_layer(self.weight, layer)
        normed = normed * (weight + 1.0 if self.kind == "rms_plus_one" else weight)
        if self.kind == "layer":
            normed = normed + self._of_layer(self.bias, layer)
        return normed.astype(x.dtype)

    def _of_layer(
        self, parameter: "nnx.Param[Array]", layer: Layer | None
    ) -> Float[Array, " width"]:
        value = parameter[...] if layer is None else parameter[...][layer]
        return widen(value, self.weight_dtype, FLOAT32)


class Embedding(nnx.Module):
    """A `[vocab, hidden]` matrix: the token embeddings, or the output head, or both."""

    def __init__(
        self, vocab: int, hidden: int, *, dtype: np.dtype[Any], tiled: bool, rngs: nnx.Rngs
    ):
        weight = jax.random.normal(rngs.params(), (vocab, hidden), jnp.float32)
        self.weight = nnx.Param(weight.astype(dtype))
        self.weight_dtype = np.dtype(dtype)
        self.tiled = tiled

    def lookup(
        self, tokens: Int[Array, " tokens"], dtype: np.dtype[Any]
    ) -> Float[Array, "tokens hidden"]:
        """Return the rows of these token ids. Ids past the end (padding) get the last row."""
        return widen(self.weight[...].at[tokens].get(mode="clip"), self.weight_dtype, dtype)

    def logits(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """Return `x @ weight.T` in float32."""
        weight = self.weight[...][None]
        return stacked_matmul(x, weight, 0, weight_dtype=self.weight_dtype, tiled=self.tiled)


def activate(kind: Activation, x: Float[Array, "tokens mlp"]) -> Float[Array, "tokens mlp"]:
    """Return `activation(x)`, computed in float32, in `x.dtype`."""
    return _activation(kind, x.astype(jnp.float32)).astype(x.dtype)


def gated_activation(
    kind: Activation, gate: Float[Array, "tokens mlp"], up: Float[Array, "tokens mlp"]
) -> Float[Array, "tokens mlp"]:
    """Return `activation(gate) * up`, computed in float32, in `up.dtype`.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    y = _activation(kind, gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return y.astype(up.dtype)


def _activation(kind: Activation, x: Array) -> Array:
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
