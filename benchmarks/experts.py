"""Mixture of experts: one expert per tile, a grouped matmul, and all experts on all tokens.

    python -m benchmarks.experts

All sides have the same tokens, router and bf16 weights, and agree before anything is timed.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx

from benchmarks._common import header, interleaved, median, parser, table
from jfp8kv.models.config import ExpertsConfig
from jfp8kv.models.experts import Experts
from jfp8kv.models.layers import FLOAT32
from jfp8kv.models.linear import as_bits, widen

SHAPES = Path(__file__).parent.parent / "configs" / "bench" / "experts.yaml"
BFLOAT16 = np.dtype(jnp.bfloat16)


def module(shape: dict, *, tiled: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """Return one layer of experts with fixed random weights; `tiled` is the layout of CPUs."""
    config = ExpertsConfig(
        count=shape["experts"], top_k=shape["top_k"], hidden=shape["mlp"], layers=(0,)
    )
    experts = Experts(
        config, shape["hidden"], "silu", dtype=BFLOAT16, tiled=tiled, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(experts)
    return graph, jax.tree.map(as_bits, state) if tiled else state


def chosen_experts(experts: Experts, x: jax.Array) -> jax.Array:
    """Run each token through the experts it was routed to, with the library's implementation."""
    return experts(x, 0, jnp.ones(x.shape[0], bool))


def every_expert(experts: Experts, x: jax.Array) -> jax.Array:
    """Run all experts on all tokens and multiply most results by zero: the naive implementation."""
    share, chosen = experts.route(x, 0)
    weight = (
        jnp.zeros((x.shape[0], experts.config.count))
        .at[jnp.arange(x.shape[0])[:, None], chosen]
        .set(share)
    )
    gate, up, down = (
        widen(p.weight[...][0], BFLOAT16, FLOAT32) for p in (experts.gate, experts.up, experts.down)
    )
    inner = jax.nn.silu(jnp.einsum("ti,eoi->teo", x, gate)) * jnp.einsum("ti,eoi->teo", x, up)
    return jnp.einsum("teo,eho,te->th", inner, down, weight)


def compiled(
    forward: Callable, graph: nnx.GraphDef, state: nnx.State
) -> Callable[[jax.Array], jax.Array]:
    """Return `forward(experts, x)`, compiled with the weights as an argument."""
    step = jax.jit(lambda state, x: forward(nnx.merge(graph, state), x))
    return lambda x: step(state, x)


def run(name: str, shape: dict, rounds: int) -> None:
    tiled, grouped = module(shape, tiled=True), module(shape, tiled=False)
    rows = []
    for tokens in shape["tokens"]:
        x = jnp.asarray(
            np.random.default_rng(tokens).normal(size=(tokens, shape["hidden"])), jnp.float32
        )
        sides = {
            "one expert per tile": compiled(chosen_experts, *tiled),
            "ragged_dot": compiled(chosen_experts, *grouped),
            "all experts": compiled(every_expert, *tiled),
        }
        want = np.asarray(sides["all experts"](x))
        for side, call in sides.items():
            error = float(np.abs(np.asarray(call(x)) - want).max() / np.abs(want).max())
            assert error < 1e-4, f"{side} is wrong by {error}: not timed"
        seconds = interleaved(
            {side: lambda call=call, x=x: call(x) for side, call in sides.items()}, rounds=rounds
        )
        ms = {side: 1e3 * median(times) for side, times in seconds.items()}
        rows.append(
            [
                str(tokens),
                *(f"{ms[s]:.1f}" for s in sides),
                f"{ms['all experts'] / ms['one expert per tile']:.1f}x",
            ]
        )
    columns = [
        "tokens",
        "one expert per tile, ms",
        "ragged_dot, ms",
        "all experts, ms",
        "tiles vs all experts",
    ]
    table(f"{name}: {shape}", columns, rows)


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    for name, shape in yaml.safe_load(SHAPES.read_text()).items():
        run(name, shape, given.rounds)


if __name__ == "__main__":
    main()
