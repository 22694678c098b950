"""Decode attention over a paged cache: FP8 tiles against bf16 and f32 tiles, and against a gather.

    python -m benchmarks.attention

All configurations compute the same attention over the same tokens, are checked against the
reference first, and are interleaved in one run. Keys are transposed in their pages, except for
"keys as values". "gather + astype" is the naive implementation: gather all pages of a request,
cast, attend.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax import lax

from benchmarks._common import header, interleaved, median, parser, table
from jfp8kv.attention import reference, xla
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import KVPool, LayerScales
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import BFLOAT16, E4M3, E5M2, FLOAT32, KVFormat, encode_numpy

SHAPES = Path(__file__).parent.parent / "configs" / "bench" / "attention.yaml"


class Problem:
    """One shape in one format: the pool, the queries, and the implementations."""

    def __init__(self, fmt: KVFormat, shape: dict[str, int], *, keys_transposed: bool = True):
        rng = np.random.default_rng(0)
        self.shape = shape
        self.fmt = fmt
        per_request = shape["length"] // shape["page_size"]
        pages = shape["requests"] * per_request
        size = (pages, shape["kv_heads"], shape["page_size"], shape["head_dim"])
        k, v = (jnp.asarray(encode_numpy(rng.normal(size=size), fmt)) for _ in "kv")
        k = k.swapaxes(2, 3) if keys_transposed else k
        self.pages = KVPool(
            k, v, None, None, layout=PoolLayout.uniform(fmt, 1, keys_transposed=keys_transposed)
        )
        self.table = jnp.asarray(
            rng.permutation(pages).reshape(shape["requests"], per_request), jnp.int32
        )
        heads = shape["kv_heads"] * shape["group"]
        self.q = jnp.asarray(
            rng.normal(size=(shape["requests"], 1, heads, shape["head_dim"])), jnp.float32
        )
        self.scales = LayerScales.of(
            KVScales.unit(1), layers=1, kv_heads=shape["kv_heads"], head_dim=shape["head_dim"]
        )
        self.options = AttentionOptions(sm_scale=shape["head_dim"] ** -0.5)

    def compiled(self, attention):
        """Return a function without arguments that computes `attention` of all requests."""

        def one(q, page_table, pages):
            length = jnp.int32(self.shape["length"])
            at = AttentionMetadata(page_table, length - 1, length, length)
            return attention(q, pages, self.scales, self.options, at, layer=jnp.int32(0))

        step = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
        return lambda: step(self.q, self.table, self.pages)

    def gather_and_cast(self):
        """Return a function that casts the whole context of every request, then attends."""
        dtype = self.fmt.dtype
        equation = "bhgd,bnhdp->bhgnp" if self.pages.layout.keys_transposed else "bhgd,bnhpd->bhgnp"

        @jax.jit
        def step(q, table, k, v):
            k, v = (lax.bitcast_convert_type(x, dtype)[table].astype(jnp.float32) for x in (k, v))
            q = q.reshape(*table.shape[:1], v.shape[2], -1, v.shape[4]) * self.options.sm_scale
            scores = jnp.einsum(equation, q, k)
            weights = jax.nn.softmax(scores.reshape(*scores.shape[:3], -1)).reshape(scores.shape)
            return jnp.einsum("bhgnp,bnhpd->bhgd", weights, v).reshape(self.q.shape)

        return lambda: step(self.q, self.table, self.pages.k_bits, self.pages.v_bits)


def run(name: str, shape: dict[str, int], rounds: int) -> None:
    problems = {fmt.name: Problem(fmt, shape) for fmt in (FLOAT32, BFLOAT16, E4M3, E5M2)}
    calls = {
        f"tiles, {name}": problem.compiled(xla.attention) for name, problem in problems.items()
    }
    like_values = Problem(E4M3, shape, keys_transposed=False)
    calls["keys as values, fp8_e4m3"] = like_values.compiled(xla.attention)
    calls |= {
        f"gather + astype, {n}": problems[n].gather_and_cast() for n in ("fp8_e4m3", "fp8_e5m2")
    }
    for label, call in calls.items():
        want = np.asarray(problems[label.split(", ")[1]].compiled(reference.attention)())
        error = float(np.abs(np.asarray(call()) - want).max())
        assert error < 1e-5, f"{label}: the error is {error}, not timed"
    seconds = interleaved(calls, rounds=rounds)
    ms = {label: 1e3 * median(times) for label, times in seconds.items()}
    elements = 2 * shape["requests"] * shape["length"] * shape["kv_heads"] * shape["head_dim"]
    bf16 = ms["tiles, bfloat16"]
    rows = []
    for label, value in ms.items():
        gather = ms[f"gather + astype, {label.split(', ')[1]}"] / value if "fp8" in label else None
        rows.append(
            [
                label,
                f"{value:.1f}",
                f"{1e3 * min(seconds[label]):.1f}",
                f"{elements / value / 1e6:.2f}",
                f"{bf16 / value:.2f}x",
                f"{gather:.1f}x" if gather else "",
            ]
        )
    columns = [
        "attention",
        "median ms",
        "minimum ms",
        "Gelem/s",
        "against bf16 tiles",
        "against gather + astype",
    ]
    table(f"{name}: {shape}", columns, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(rounds=15)
    given = arguments.parse_args()
    header()
    for name, shape in yaml.safe_load(SHAPES.read_text())["timed"].items():
        run(name, shape, given.rounds)


if __name__ == "__main__":
    main()
