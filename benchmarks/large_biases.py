"""KL divergence of FP8 caches of a model with large K biases, as in Qwen2 and Qwen2.5, by scales.

    python -m benchmarks.large_biases --text FILE --calibration FILE

SmolLM2 gets a bias on its K projections, of size `--biases` and random sign: on the pairs of
channels that RoPE rotates slowest, where it stays constant ("slow"), or on all ("all"). KL
divergence, in nats per token, is from the float32 cache of the same model. "auto" is the default of
an engine. Without files, one half of this repository's documentation is measured and the other
calibrated on.
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
from jfp8kv.quality.layer_options import LayerOptions, full_scales
from jfp8kv.quality.mixed_precision import SensitivityAnalysis

SLOW_PAIRS = 4  # of each head


def with_biases(params: jfp8kv.Params, size: float, pairs: str) -> jfp8kv.Params:
    """Return the model with `size` or `-size` added to keys before RoPE."""
    config = params.config
    layers = dict(params.tree["layers"])
    half = config.head_dim // 2
    shape = (config.layers, config.kv_heads, 2, half)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], shape)
    biased = np.arange(half) >= (half - SLOW_PAIRS if pairs == "slow" else 0)
    biases = {name: np.zeros(layers[name]["weight"].shape[:2]) for name in "qkv"}
    biases["k"] = (size * signs * biased).reshape(config.layers, -1)
    for name, bias in biases.items():
        layers[name] = layers[name] | {"bias": jnp.asarray(bias, params.dtype)}
    config = dataclasses.replace(config, qkv_bias=True)
    return jfp8kv.Params(params.tree | {"layers": layers}, config, params.tokenizer)


def windows(params: jfp8kv.Params, text: str, tokens: int, count: int) -> list[list[int]]:
    """Return up to `count` windows of at least two tokens."""
    ids = params.tokenizer.encode(text[: 10 * tokens * count])
    found = [ids[i : i + tokens] for i in range(0, len(ids), tokens)]
    return [each for each in found if len(each) > 1][:count]


def losses(
    params: jfp8kv.Params,
    kv_dtype: str,
    calibration: list[list[int]],
    measured: list[list[int]],
) -> dict[str, float]:
    """Return the KL divergence by the scales that every layer uses."""
    longest = max(map(len, measured))
    layers = params.config.layers
    known = LayerOptions.of(params, [kv_dtype], calibration, max_model_len=longest)
    auto = automatic_cache(params, kv_dtype, longest)
    fallback = LayerPlan("bfloat16")
    plans = (*known.plans, LayerPlan(kv_dtype, "head", True), fallback)
    scales = (
        *known.scales,
        full_scales(auto.scales, params.config),
        full_scales(None, params.config),
    )
    assignments = {
        f"{plan.scales}{' with K offset' if plan.k_offset else ''}": [option] * layers
        for option, plan in enumerate(known.plans)
    }
    bfloat16 = plans.index(fallback)
    assignments["auto"] = [
        bfloat16 - 1 if spec.fmt is kv_format(kv_dtype) else bfloat16 for spec in auto.specs
    ]
    analysis = SensitivityAnalysis(params, LayerOptions(plans, scales), measured, progress=False)
    return {name: analysis.loss(options) for name, options in assignments.items()}


def automatic_cache(params: jfp8kv.Params, kv_dtype: str, longest: int):
    """Return the cache that an engine chooses, and print its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto = resolve_cache(
            params,
            kv_dtype,
            "auto",
            page_size=64,
            max_tokens_per_dispatch=64,
            max_model_len=longest,
        )
    for warning in caught:
        console.print(str(warning.message), style="dim")
    return auto


def arguments() -> argparse.Namespace:
    """Return the command line arguments."""
    options = parser(__doc__)
    options.add_argument("--text", help="a text file to measure on")
    options.add_argument("--calibration", help="a text file to calibrate on")
    options.add_argument("--window", type=int, default=512, help="tokens of a window")
    options.add_argument(
        "--windows",
        type=int,
        default=4,
        help="windows to measure on; twice as many are calibrated on",
    )
    options.add_argument("--biases", type=float, nargs="+", default=[0.0, 10.0, 50.0, 200.0, 800.0])
    options.add_argument("--pairs", nargs="+", choices=["slow", "all"], default=["slow"])
    options.add_argument("--kv-dtype", default="fp8_e4m3")
    return options.parse_args()


def main() -> None:
    """Measure and print."""
    given = arguments()
    header()
    plain = jfp8kv.load(given.model or smollm2(), dtype="float32")
    text = text_of(given.text)
    calibration_text = text_of(given.calibration)
    if not (given.text and given.calibration):
        half = len(text) // 2
        text, calibration_text = text[:half], text[half:]
    measured = windows(plain, text, given.window, given.windows)
    calibration = windows(plain, calibration_text, given.window, 2 * given.windows)
    console.print(
        f"{sum(map(len, measured))} tokens measured, {sum(map(len, calibration))} calibrated on"
    )
    rows = []
    for pairs in given.pairs:
        for size in given.biases:
            params = with_biases(plain, size, pairs)
            found = losses(params, given.kv_dtype, calibration, measured)
            rows.append([f"{size:g}, {pairs}", *(f"{loss:.5f}" for loss in found.values())])
            console.print(*rows[-1])
    table(
        f"KL from the float32 cache, nats per token, {given.kv_dtype}",
        ["K bias, pairs", *found],
        rows,
    )


if __name__ == "__main__":
    main()
