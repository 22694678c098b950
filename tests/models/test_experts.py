"""Expert layers: each implementation agrees with a NumPy loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfp8kv.models.config import ExpertsConfig
from jfp8kv.models.experts import MAX_TILE, MIN_TILE, Experts, _tile

HIDDEN, LAYERS = 24, 3
BOTH = pytest.mark.parametrize("tiled", [True, False], ids=["by tile", "by group"])


def experts(*, tiled: bool, **options) -> Experts:
    options = {"count": 5, "top_k": 2, "hidden": 16, "layers": (0, 2, 3)} | options
    module = Experts(
        ExpertsConfig(**options),
        HIDDEN,
        "silu",
        dtype=np.dtype(np.float32),
        tiled=tiled,
        rngs=nnx.Rngs(3),
    )
    graph, state = nnx.split(module)
    rng = np.random.default_rng(7)
    noisy = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), state
    )  # biases too
    return nnx.merge(graph, noisy)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32)


def by_token(module: Experts, x: np.ndarray, slot: int) -> np.ndarray:
    """Return the outputs of a loop over tokens and experts in float64."""
    c = module.config

    def read(part, *at):
        bias = np.asarray(part.bias[...], np.float64)[at] if part.has_bias else 0.0
        return np.asarray(part.weight[...], np.float64)[at], bias

    def apply(part, x, *at):
        weight, bias = read(part, *at)
        return weight @ x + bias

    def silu(x):
        return x / (1 + np.exp(-x))

    out = []
    for token in x.astype(np.float64):
        logits = apply(module.router, token, slot)
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        chosen = np.argsort(-probability, kind="stable")[: c.top_k]
        total = probability[chosen].sum() if c.normalized else 1.0
        y = np.zeros(HIDDEN)
        for e in chosen:
            gate, up = apply(module.gate, token, slot, e), apply(module.up, token, slot, e)
            if c.clamped:
                gate, up = np.minimum(gate, c.limit), np.clip(up, -c.limit, c.limit)
                inner = (up + 1) * gate / (1 + np.exp(-c.alpha * gate))
            else:
                inner = silu(gate) * up
            y += probability[e] / total * apply(module.down, inner, slot, e)
        if c.shared_hidden:
            inner = silu(apply(module.shared_gate, token, slot)) * apply(
                module.shared_up, token, slot
            )
            y += apply(module.shared_down, inner, slot) / (
                1 + np.exp(-apply(module.shared_switch, token, slot))
            )
        out.append(y)
    return np.array(out)


@BOTH
@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalized": False, "shared_hidden": 12},
        {"bias": True, "clamped": True, "limit": 0.5},
        {"count": 2, "top_k": 2},
    ],
    ids=["plain", "shared", "clamped", "all of them"],
)
def test_each_token_goes_through_its_experts(tiled, count, options) -> None:
    """Three matmuls of at most 24 terms, with errors of 2**-24 of the sum of magnitudes: 1e-5."""
    module, x = experts(tiled=tiled, **options), tokens(count)
    for slot in range(LAYERS):
        want = by_token(module, x, slot)
        got = jax.jit(module)(x, jnp.int32(slot), jnp.ones(count, bool))
        assert np.abs(np.asarray(got) - want).max() <= 1e-5 * np.abs(want).max()


@BOTH
def test_requests_are_routed_together_under_vmap(tiled) -> None:
    module = experts(tiled=tiled)
    x = jnp.stack([tokens(6, 1), tokens(6, 2), tokens(6, 3)])
    real = jnp.ones((3, 6), bool).at[1, 4:].set(False)
    together = jax.jit(jax.vmap(lambda x, real: module(x, jnp.int32(1), real)))(x, real)
    for i in range(3):
        want = by_token(module, np.asarray(x[i]), 1)
        assert (
            np.abs(np.asarray(together[i] - want)[np.asarray(real[i])]).max()
            <= 1e-5 * np.abs(want).max()
        )


@BOTH
def test_padding_is_sent_to_no_expert_and_gets_zeros(tiled) -> None:
    real = jnp.asarray([True, False, True, False])
    x = jnp.asarray(tokens(4)).at[1].set(jnp.nan)
    got = np.asarray(experts(tiled=tiled)(x, 0, real))
    assert np.array_equal(got[[1, 3]], np.zeros((2, HIDDEN))) and np.isfinite(got).all()


def test_an_expert_without_tokens_is_not_read() -> None:
    """Its weights are NaN, so any use would show."""
    module = experts(tiled=True)
    x, real = jnp.asarray(tokens(3)), jnp.ones(3, bool)
    used = np.unique(np.asarray(module.route(x, 0)[1]))
    unused = [e for e in range(5) if e not in used]
    assert unused, "every expert is used: no test"
    want = np.asarray(module(x, 0, real))
    for part in (module.gate, module.up, module.down):
        part.weight[...] = part.weight[...].at[:, jnp.asarray(unused)].set(jnp.nan)
    assert np.array_equal(np.asarray(module(x, 0, real)), want)


@pytest.mark.parametrize(
    ("assignments", "count", "rows"),
    [(1, 128, MIN_TILE), (64, 32, 2), (2048, 32, 64), (10**6, 8, MAX_TILE), (300, 100, 4)],
)
def test_a_tile_has_the_average_number_of_rows_of_an_expert(assignments, count, rows) -> None:
    assert _tile(assignments, count) == rows
