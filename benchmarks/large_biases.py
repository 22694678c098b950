"""What FP8 costs a model whose keys have large biases, as those of Qwen2 and Qwen2.5 do, by how the cache is scaled.

    python -m benchmarks.large_biases --text FILE --calibration FILE

SmolLM2 gets a bias on its K projections: `--biases` is the size of the number, its sign random, on the pairs of channels that
turn slowest with the position ("slow": there it stays constant), or on all ("all"). KL divergence, nats per token, is from the
float32 cache of the same model. "auto" is what an engine does without being told. Without files the documentation of this
repository is halved.
"""

import argparse
import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np

import jfp8kv
from benchmarks._common import console, header, parser, smollm2, table, text_of
from jfp8kv.cache.config import resolve_cache
from jfp8kv.cache.plan import LayerPlan
from jfp8kv.core.formats import kv_format
from jfp8kv.quality.layer_candidates import Candidates, full
from jfp8kv.quality.mixed_precision import SensitivityAnalysis

SLOW_PAIRS = 4  # of each head


def with_biases(params: jfp8kv.Params, size: float, metadata: str) -> jfp8kv.Params:
    """The same model, with `size` or `-size` added to keys before RoPE."""
    c, layers = params.config, dict(params.tree["layers"])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (c.layers, c.kv_heads, 2, c.head_dim // 2))
    pairs = np.arange(c.head_dim // 2) >= c.head_dim // 2 - (
        SLOW_PAIRS if metadata == "slow" else c.head_dim
    )
    biases = {name: np.zeros(layers[name]["weight"].shape[:2]) for name in "qkv"}
    biases["k"] = (size * signs * pairs).reshape(c.layers, -1)
    for name, bias in biases.items():
        layers[name] = layers[name] | {"bias": jnp.asarray(bias, params.dtype)}
    return jfp8kv.Params(
        params.tree | {"layers": layers}, dataclasses.replace(c, qkv_bias=True), params.tokenizer
    )


def windows(params: jfp8kv.Params, text: str, tokens: int, most: int) -> list[list[int]]:
    ids = params.tokenizer.encode(text[: 10 * tokens * most])
    return [piece for i in range(0, len(ids), tokens) if len(piece := ids[i : i + tokens]) > 1][
        :most
    ]


def losses(
    params: jfp8kv.Params, kv_dtype: str, known: list[list[int]], measured: list[list[int]]
) -> dict[str, float]:
    """KL divergence by the name of what every layer keeps."""
    longest, every = max(map(len, measured)), range(params.config.layers)
    found = Candidates.of(params, [kv_dtype], known, longest=longest)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        auto = resolve_cache(
            params, kv_dtype, "auto", page_size=64, max_tokens_per_dispatch=64, longest=longest
        )
    for warning in said:
        console.print(str(warning.message), style="dim")
    plans = (*found.plans, LayerPlan(kv_dtype, "head", True), LayerPlan("bfloat16"))
    scales = (*found.scales, full(auto.scales, params.config), full(None, params.config))
    ways = {
        f"{plan.scales}{' less offset' if plan.k_offset else ''}": [way] * len(every)
        for way, plan in enumerate(found.plans)
    }
    ways["auto"] = [
        plans.index(LayerPlan("bfloat16")) - (kind.fmt is kv_format(kv_dtype))
        for kind in auto.specs
    ]
    trial = SensitivityAnalysis(params, Candidates(plans, scales), measured, progress=False)
    return {name: trial.whole(way) for name, way in ways.items()}


def arguments() -> argparse.Namespace:
    asked = parser(__doc__)
    asked.add_argument("--text", help="a text file to measure on")
    asked.add_argument("--calibration", help="a text file to calibrate on")
    asked.add_argument("--window", type=int, default=512, help="tokens of a piece")
    asked.add_argument(
        "--windows",
        type=int,
        default=4,
        help="pieces to measure on, and twice as many to calibrate on",
    )
    asked.add_argument("--biases", type=float, nargs="+", default=[0.0, 10.0, 50.0, 200.0, 800.0])
    asked.add_argument("--where", nargs="+", choices=["slow", "all"], default=["slow"])
    asked.add_argument("--kv-dtype", default="fp8_e4m3")
    return asked.parse_args()


def main() -> None:
    given = arguments()
    header()
    plain = jfp8kv.load(given.model or smollm2(), dtype="float32")
    text, known = text_of(given.text), text_of(given.calibration)
    if not (given.text and given.calibration):
        text, known = text[: len(text) // 2], text[len(text) // 2 :]
    measured = windows(plain, text, given.window, given.windows)
    calibrated = windows(plain, known, given.window, 2 * given.windows)
    console.print(
        f"{sum(map(len, measured))} tokens measured, {sum(map(len, calibrated))} calibrated on"
    )
    rows = []
    for metadata, size in ((metadata, size) for metadata in given.where for size in given.biases):
        found = losses(with_biases(plain, size, metadata), given.kv_dtype, calibrated, measured)
        rows.append([f"{size:g}, {metadata}", *(f"{loss:.5f}" for loss in found.values())])
        console.print(*rows[-1])
    table(
        f"KL from the float32 cache, nats per token, {given.kv_dtype}",
        ["K bias, pairs", *found],
        rows,
    )


if __name__ == "__main__":
    main()
