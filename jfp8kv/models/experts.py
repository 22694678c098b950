"""Expert layers (mixture of experts): every token is sent to a few of many MLPs.

The tokens of all requests are routed together: under `vmap` over requests there is one
computation (`custom_vmap`), so a batch reads each expert once. Assignments (token, expert) are
sorted by expert. Then, depending on the device:

- On a CPU, a loop over tiles of assignments of one expert each. A tile reads the matrices of its
  expert once, directly from the stack of all layers (models/linear.py). Experts without tokens are
  not read.
- On accelerators, `jax.lax.ragged_dot_general`, which runs as one grouped matmul.

Both add the experts of a token in the order of their index, so the output of a token does not
depend on the other tokens in the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from jfp8kv.core.pytree import broadcast_unbatched
from jfp8kv.models.config import Activation, ExpertsConfig
from jfp8kv.models.layers import FLOAT32, Layer, Linear, gated_activation
from jfp8kv.models.linear import stacked_matmul, widen

# Assignments per tile: matmuls with one row are slow, and many rows overflow the caches of a CPU.
MIN_TILE = 2
MAX_TILE = 128

Projection = tuple[Array, Array | None]  # weight and bias


class Expert(nnx.Module):
    """One projection of all experts of all layers that have them: `[layers, experts, out, in]`."""

    def __init__(
        self, shape: tuple[int, int, int, int], *, bias: bool, dtype: np.dtype[Any], rngs: nnx.Rngs
    ):
        weight = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
        self.weight = nnx.Param(weight.astype(dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[:-1], dtype))
        self.has_bias = bias

    def arrays(self) -> Projection:
        """Return weight and bias."""
        return self.weight[...], self.bias[...] if self.has_bias else None


class Experts(nnx.Module):
    """Router, experts and shared expert of all layers with experts, numbered by `slot`."""

    def __init__(
        self,
        config: ExpertsConfig,
        hidden: int,
        activation: Activation,
        *,
        dtype: np.dtype[Any],
        tiled: bool,
        rngs: nnx.Rngs,
    ):
        e = config
        layers = len(e.layers)

        def expert(out: int, width: int) -> Expert:
            return Expert((layers, e.count, out, width), bias=e.bias, dtype=dtype, rngs=rngs)

        def linear(out: int, width: int, bias: bool = False) -> Linear:
            return Linear(layers, out, width, bias=bias, dtype=dtype, tiled=tiled, rngs=rngs)

        self.router = linear(e.count, hidden, e.bias)
        self.gate = expert(e.hidden, hidden)
        self.up = expert(e.hidden, hidden)
        self.down = expert(hidden, e.hidden)
        if e.shared_hidden:
            self.shared_gate = linear(e.shared_hidden, hidden)
            self.shared_up = linear(e.shared_hidden, hidden)
            self.shared_down = linear(hidden, e.shared_hidden)
            self.shared_switch = linear(1, hidden)
        self.config = config
        self.activation = activation
        self.weight_dtype = np.dtype(dtype)
        self.tiled = tiled

    def __call__(
        self, x: Float[Array, "tokens hidden"], slot: Layer, real: Bool[Array, " tokens"]
    ) -> Array:
        """Return the weighted sum of the experts of each token, `[tokens, hidden]`.

        Tokens that are not `real` are padding and get zeros.
        """
        weights, experts = self.route(x, slot)
        experts = jnp.where(real[:, None], experts, self.config.count)
        y = self._run_experts(x, weights, experts, slot).astype(x.dtype)
        return y + self._shared(x, slot) if self.config.shared_hidden else y

    def route(
        self, x: Array, slot: Layer
    ) -> tuple[Float[Array, "tokens top_k"], Int[Array, "tokens top_k"]]:
        """Return the weights and the indices of the experts of each token."""
        logits = self.router(x, slot).astype(jnp.float32)
        weights, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.top_k)
        if self.config.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def _shared(self, x: Array, slot: Layer) -> Array:
        gate = self.shared_gate(x, slot)
        up = self.shared_up(x, slot)
        y = self.shared_down(gated_activation(self.activation, gate, up), slot)
        switch = jax.nn.sigmoid(self.shared_switch(x, slot).astype(jnp.float32))
        return (switch * y.astype(jnp.float32)).astype(x.dtype)

    def _run_experts(
        self, x: Array, weights: Array, experts: Array, slot: Layer
    ) -> Float[Array, "tokens hidden"]:
        """Return the expert outputs of every token in float32; one computation under `vmap`."""
        projections = tuple(p.arrays() for p in (self.gate, self.up, self.down))

        @custom_vmap
        def run(
            x: Array,
            weights: Array,
            experts: Array,
            slot: Array,
            projections: tuple[Projection, ...],
        ) -> Array:
            implementation = self._by_tile if self.tiled else self._by_group
            return implementation(x, weights, experts, slot, projections)

        @run.def_vmap
        def run_requests(requests: int, batched: list[Any], *args: Any) -> tuple[Array, bool]:
            assert not any(jax.tree.leaves(batched[3:])), (
                "weights and layer are shared by the requests"
            )
            by_request = broadcast_unbatched(requests, batched[:3], args[:3])
            y = run(*(x.reshape(-1, x.shape[-1]) for x in by_request), *args[3:])
            return y.reshape(requests, -1, y.shape[-1]), True

        return run(x, weights, experts, jnp.int32(slot), projections)

    def _gated(self, gate: Array, up: Array) -> Array:
        c = self.config
        if not c.clamped:
            return gated_activation(self.activation, gate, up)
        gate = jnp.minimum(gate, c.limit)
        up = jnp.clip(up, -c.limit, c.limit)
        return (up + 1.0) * gate * jax.nn.sigmoid(c.alpha * gate)

    def _by_tile(
        self,
        x: Array,
        weights: Array,
        experts: Array,
        slot: Array,
        projections: tuple[Projection, ...],
    ) -> Array:
        """Return the expert outputs of every token, by a loop over tiles of assignments."""
        count = self.config.count
        assignments = experts.size
        order, sizes = _sort_by_expert(experts, count)
        start = jnp.cumsum(sizes) - sizes
        tile = _tile(assignments, count)
        last = jnp.cumsum(-(-sizes // tile))  # number of tiles up to and including each expert

        def project(rows: Array, projection: Projection, expert: Array) -> Array:
            weight, bias = projection
            index = slot * count + expert
            weight = weight.reshape(-1, *weight.shape[2:])
            y = stacked_matmul(rows, weight, index, weight_dtype=self.weight_dtype, tiled=True)
            if bias is not None:
                bias = bias.reshape(-1, bias.shape[-1])[index]
                y = y + widen(bias, self.weight_dtype, FLOAT32)
            return y

        def body(i: Array, out: Array) -> Array:
            expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32)
            tile_of_expert = i - jnp.where(expert > 0, last[expert - 1], 0)
            within = tile_of_expert * tile + jnp.arange(tile, dtype=jnp.int32)
            at = jnp.where(
                within < sizes[expert],
                order[jnp.minimum(start[expert] + within, assignments - 1)],
                assignments,
            )
            token = at // experts.shape[1]  # past the end for padding rows of the tile
            rows = x.at[token].get(mode="clip")
            gate, up, down = projections
            inner = self._gated(project(rows, gate, expert), project(rows, up, expert))
            y = project(inner.astype(x.dtype), down, expert)
            y = y * weights.reshape(-1).at[at].get(mode="clip")[:, None]
            return out.at[token].add(y, mode="drop")

        return lax.fori_loop(0, last[-1], body, jnp.zeros(x.shape, jnp.float32))

    def _by_group(
        self,
        x: Array,
        weights: Array,
        experts: Array,
        slot: Array,
        projections: tuple[Projection, ...],
    ) -> Array:
        """Return the expert outputs of every token, by grouped matmuls."""
        count = self.config.count
        order, sizes = _sort_by_expert(experts, count)
        expert = experts.reshape(-1)[order]
        token = order // experts.shape[1]
        groups = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])

        def project(rows: Array, projection: Projection) -> Array:
            weight, bias = projection
            weight = widen(weight[slot], self.weight_dtype, x.dtype)
            y = lax.ragged_dot_general(
                rows, weight, sizes, groups, preferred_element_type=jnp.float32
            )
            if bias is not None:
                bias = widen(bias[slot], self.weight_dtype, x.dtype).astype(jnp.float32)
                y = y + bias.at[expert].get(mode="clip")
            return y

        rows = x[token]
        gate, up, down = projections
        y = project(self._gated(project(rows, gate), project(rows, up)).astype(x.dtype), down)
        y = jnp.where((expert < count)[:, None], y * weights.reshape(-1)[order][:, None], 0.0)
        return jnp.zeros(x.shape, jnp.float32).at[token].add(y)


def _sort_by_expert(
    experts: Int[Array, "tokens top_k"], count: int
) -> tuple[Int[Array, " assignments"], Int[Array, " experts"]]:
    """Return the assignments sorted by expert, padding last, and their number for each expert."""
    flat = experts.reshape(-1)
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
    return jnp.argsort(flat, stable=True).astype(jnp.int32), sizes


def _tile(assignments: int, experts: int) -> int:
    """Return the rows per tile: the average number of assignments, as a power of two."""
    average = max(1, assignments // experts)
    return min(MAX_TILE, max(MIN_TILE, 1 << (average - 1).bit_length()))
