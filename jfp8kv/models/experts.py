"""A mixture of experts: every token is sent to a few of many MLPs, and no expert sees a token it was not sent.

The tokens of all requests are routed together: under `vmap` over requests the computation stays one (`custom_vmap`), so a batch
shares each expert that is read. Assignments (token, expert) are sorted by expert; what follows depends on the device:

- On a CPU, a loop over tiles of assignments of one expert each: a tile reads its expert's matrices once, straight from the
  stack of all layers (models/linear.py), and an expert that nobody was sent to is never read.
- Elsewhere, `jax.lax.ragged_dot_general`, which the backend's libraries run as one grouped product.

Both add a token's experts in the order of their index, so a token's output does not depend on what runs beside it.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from jfp8kv.models.config import Activation, ExpertsConfig
from jfp8kv.models.layers import FLOAT32, Layer, Linear, gated
from jfp8kv.models.linear import stacked_matmul, widen

Projections: TypeAlias = tuple[tuple[Array, Array | None], ...]

SMALLEST_TILE, LARGEST_TILE = (
    2,
    128,
)  # assignments per tile: a single row is slow (models/linear.py), many overflow the caches


class Expert(nnx.Module):
    """One projection of all experts of all layers that have them: `[layers, experts, out, in]`."""

    def __init__(
        self, shape: tuple[int, int, int, int], *, bias: bool, dtype: np.dtype, rngs: nnx.Rngs
    ):
        weight = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
        self.weight = nnx.Param(weight.astype(dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[:-1], dtype))
        self.has_bias = bias

    def arrays(self) -> tuple[Array, Array | None]:
        """Weight and bias, or None for the latter."""
        return self.weight[...], self.bias[...] if self.has_bias else None


class Experts(nnx.Module):
    """Router, experts and, if there is one, the shared expert of every layer that has them; called with a slot among those."""

    def __init__(
        self,
        config: ExpertsConfig,
        hidden: int,
        activation: Activation,
        *,
        dtype: np.dtype,
        tiled: bool,
        rngs: nnx.Rngs,
    ):
        layers, e = len(config.layers), config

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
        self.stored = np.dtype(dtype)
        self.tiled = tiled

    def __call__(
        self, x: Float[Array, "tokens hidden"], slot: Layer, real: Bool[Array, " tokens"]
    ) -> Array:
        """The sum of each token's experts, `[tokens, hidden]`; tokens that are not `real` are padding and get zeros."""
        share, chosen = self.route(x, slot)
        chosen = jnp.where(real[:, None], chosen, self.config.count)
        y = self._chosen(x, share, chosen, slot).astype(x.dtype)
        return y + self._shared(x, slot) if self.config.shared_hidden else y

    def route(
        self, x: Array, slot: Layer
    ) -> tuple[Float[Array, "tokens top_k"], Int[Array, "tokens top_k"]]:
        """The weight and the index of each token's experts."""
        logits = self.router(x, slot).astype(jnp.float32)
        share, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.top_k)
        if self.config.normalized:
            share = share / jnp.sum(share, axis=-1, keepdims=True)
        return share, chosen

    def _shared(self, x: Array, slot: Layer) -> Array:
        y = self.shared_down(
            gated(self.activation, self.shared_gate(x, slot), self.shared_up(x, slot)), slot
        )
        switch = jax.nn.sigmoid(self.shared_switch(x, slot).astype(jnp.float32))
        return (switch * y.astype(jnp.float32)).astype(x.dtype)

    def _chosen(
        self, x: Array, share: Array, chosen: Array, slot: Layer
    ) -> Float[Array, "tokens hidden"]:
        """Every token through its experts, in float32; the tokens of all requests at once under `vmap`."""
        projections = tuple(p.arrays() for p in (self.gate, self.up, self.down))

        @custom_vmap
        def together(
            x: Array, share: Array, chosen: Array, slot: Array, projections: Projections
        ) -> Array:
            return (self._by_tile if self.tiled else self._by_group)(
                x, share, chosen, slot, projections
            )

        @together.def_vmap
        def _(requests: int, batched: list[Any], *args: Any) -> tuple[Array, bool]:
            assert not any(jax.tree.leaves(batched[3:])), (
                "weights and layer are shared by the requests"
            )
            flat = [
                x if b else jnp.broadcast_to(x, (requests, *x.shape))
                for x, b in zip(args[:3], batched[:3], strict=True)
            ]
            y = together(*(x.reshape(-1, x.shape[-1]) for x in flat), *args[3:])
            return y.reshape(requests, -1, y.shape[-1]), True

        return together(x, share, chosen, jnp.int32(slot), projections)

    def _gated(self, gate: Array, up: Array) -> Array:
        c = self.config
        if not c.clamped:
            return gated(self.activation, gate, up)
        gate, up = jnp.minimum(gate, c.limit), jnp.clip(up, -c.limit, c.limit)
        return (up + 1.0) * gate * jax.nn.sigmoid(c.alpha * gate)

    def _by_tile(
        self, x: Array, share: Array, chosen: Array, slot: Array, projections: Projections
    ) -> Array:
        count, assignments = self.config.count, chosen.size
        order, sizes = _sorted(chosen, count)
        begin = jnp.cumsum(sizes) - sizes
        tile = _tile(assignments, count)
        last = jnp.cumsum(-(-sizes // tile))  # tiles up to and with each expert

        def project(rows: Array, which: int, expert: Array) -> Array:
            weight, bias = projections[which]
            at = slot * count + expert
            y = stacked_matmul(
                rows, weight.reshape(-1, *weight.shape[2:]), at, stored=self.stored, tiled=True
            )
            return (
                y
                if bias is None
                else y + widen(bias.reshape(-1, bias.shape[-1])[at], self.stored, FLOAT32)
            )

        def body(i: Array, out: Array) -> Array:
            expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32)
            first = i - jnp.where(expert > 0, last[expert - 1], 0)  # of the expert's own tiles
            within = first * tile + jnp.arange(tile, dtype=jnp.int32)
            at = jnp.where(
                within < sizes[expert],
                order[jnp.minimum(begin[expert] + within, assignments - 1)],
                assignments,
            )
            token = at // chosen.shape[1]  # past the end for the rows that fill up the tile
            rows = x.at[token].get(mode="clip")
            inner = self._gated(project(rows, 0, expert), project(rows, 1, expert)).astype(x.dtype)
            y = project(inner, 2, expert) * share.reshape(-1).at[at].get(mode="clip")[:, None]
            return out.at[token].add(y, mode="drop")

        return lax.fori_loop(0, last[-1], body, jnp.zeros(x.shape, jnp.float32))

    def _by_group(
        self, x: Array, share: Array, chosen: Array, slot: Array, projections: Projections
    ) -> Array:
        count = self.config.count
        order, sizes = _sorted(chosen, count)
        expert, token = chosen.reshape(-1)[order], order // chosen.shape[1]
        groups = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])

        def project(rows: Array, which: int) -> Array:
            weight, bias = projections[which]
            y = lax.ragged_dot_general(
                rows,
                widen(weight[slot], self.stored, x.dtype),
                sizes,
                groups,
                preferred_element_type=jnp.float32,
            )
            if bias is None:
                return y
            wide = widen(bias[slot], self.stored, x.dtype).astype(jnp.float32)
            return y + wide.at[expert].get(mode="clip")

        rows = x[token]
        y = project(self._gated(project(rows, 0), project(rows, 1)).astype(x.dtype), 2)
        y = jnp.where((expert < count)[:, None], y * share.reshape(-1)[order][:, None], 0.0)
        return jnp.zeros(x.shape, jnp.float32).at[token].add(y)


def _sorted(
    chosen: Int[Array, "tokens top_k"], count: int
) -> tuple[Int[Array, " assignments"], Int[Array, " experts"]]:
    """Assignments ordered by expert, padding last, and how many each expert has."""
    flat = chosen.reshape(-1)
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
    return jnp.argsort(flat, stable=True).astype(jnp.int32), sizes


def _tile(assignments: int, experts: int) -> int:
    """Rows per tile: as many as an expert has on average, as a power of two."""
    average = max(1, assignments // experts)
    return min(LARGEST_TILE, max(SMALLEST_TILE, 1 << (average - 1).bit_length()))
