"""What FP8 costs a model whose keys have large biases, as those of Qwen2 and Qwen2.5 do, by how the cache is scaled.

    python -m benchmarks.large_biases --text FILE --calibration FILE

SmolLM2 gets a bias on its K projections: `--biases` is the size of the number, its sign random, on the pairs of channels that
turn slowest with the position ("slow": there it stays constant), or on all ("all"). KL divergence, nats per token, is from the
float32 cache of the same model. Without files the documentation of this repository is halved.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from rich.progress import track

import jfp8kv
from benchmarks._common import console, header, parser, smollm2, table, text_of
from jfp8kv.planning.candidates import Candidates
from jfp8kv.planning.run import Trial

SLOW_PAIRS = 4  # of each head


def with_biases(params: jfp8kv.Params, size: float, where: str) -> jfp8kv.Params:
    """The same model, with `size` or `-size` added to keys before RoPE."""
    c, layers = params.config, dict(params.tree["layers"])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (c.layers, c.kv_heads, 2, c.head_dim // 2))
    pairs = np.arange(c.head_dim // 2) >= c.head_dim // 2 - (SLOW_PAIRS if where == "slow" else c.head_dim)
    biases = {"k": jnp.asarray((size * signs * pairs).reshape(c.layers, -1), params.dtype)}
    for name in "qkv":
        bias = biases.get(name, jnp.zeros(layers[name]["weight"].shape[:1] + (_width(c, name),), params.dtype))
        layers[name] = layers[name] | {"bias": bias}
    return jfp8kv.Params(params.tree | {"layers": layers}, dataclasses.replace(c, qkv_bias=True), params.tokenizer)


def _width(config: jfp8kv.ModelConfig, name: str) -> int:
    return (config.q_heads if name == "q" else config.kv_heads) * config.head_dim


def windows(params: jfp8kv.Params, text: str, tokens: int, most: int) -> list[list[int]]:
    ids = params.tokenizer.encode(text[: 10 * tokens * most])
    return [piece for i in range(0, len(ids), tokens) if len(piece := ids[i : i + tokens]) > 1][:most]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--text", help="a text file to measure on")
    arguments.add_argument("--calibration", help="a text file to calibrate on")
    arguments.add_argument("--window", type=int, default=512, help="tokens of a piece")
    arguments.add_argument("--windows", type=int, default=4, help="pieces to measure on, and twice as many to calibrate on")
    arguments.add_argument("--biases", type=float, nargs="+", default=[0.0, 50.0, 200.0, 800.0])
    arguments.add_argument("--where", nargs="+", choices=["slow", "all"], default=["slow"])
    arguments.add_argument("--kv-dtype", default="fp8_e4m3")
    given = arguments.parse_args()
    header()
    plain = jfp8kv.load(given.model or smollm2(), dtype="float32")
    if given.text and given.calibration:
        text, known = text_of(given.text), text_of(given.calibration)
    else:
        both = text_of(None)
        text, known = both[: len(both) // 2], both[len(both) // 2 :]
    measured = windows(plain, text, given.window, given.windows)
    calibrated = windows(plain, known, given.window, 2 * given.windows)
    counts = (sum(map(len, part)) for part in (measured, calibrated))
    console.print("{} tokens measured, {} calibrated on".format(*counts))
    rows = []
    for where in given.where:
        for size in given.biases:
            params = with_biases(plain, size, where)
            candidates = Candidates.of(params, [given.kv_dtype], calibrated, longest=given.window)
            trial = Trial(params, candidates, measured, progress=False)
            losses = [
                trial.whole([way] * params.config.layers)
                for way in track(range(len(candidates.plans)), f"{size:g} on {where} pairs", console=console, transient=True)
            ]
            rows.append([f"{size:g}, {where} pairs", *(f"{loss:.5f}" for loss in losses)])
            console.print(*rows[-1])
    names = [f"{way.scales}{' + offset' if way.k_offset else ''}" for way in candidates.plans]
    table(f"KL from the float32 cache, nats per token, {given.kv_dtype}", ["K bias", *names], rows)


if __name__ == "__main__":
    main()
