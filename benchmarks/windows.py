"""KV memory and decode speed of a model with 5:1 local and global layers, at 8k tokens.

    python -m benchmarks.windows

One request with a long prompt runs in an engine with random weights, in bf16 and FP8 caches. "MiB"
is the peak of `llm.stats.kv_bytes_used`. It is compared with one page table for all layers, where
windowed layers keep all pages: the measured use of the same model without windows. Then decode
speed with and without windows, interleaved.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import yaml

import jfp8kv
from benchmarks._common import header, interleaved, median, table
from jfp8kv.engine.buckets import DECODE_STEPS, DECODE_STEPS_DURING_PREFILL
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.names import expected_shapes, unflatten

MODEL = Path(__file__).parent.parent / "configs" / "bench" / "windows.yaml"
DTYPES = ("bfloat16", "fp8_e4m3")
MIB = 2**20


def random_params(config: ModelConfig) -> jfp8kv.Params:
    """Return a model with random weights."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.05, shape).astype(config.dtype)
        for name, shape in expected_shapes(config).items()
    }
    return jfp8kv.Params.from_pytree(unflatten(weights), config)


def check(params: jfp8kv.Params, ids: list[int]) -> None:
    """Compare the logits of a sequence with those of the reference attention.

    With a float32 cache both store the same values. In a coarser format a last-bit difference may
    change what is stored.
    """
    want, got = (
        jfp8kv.LLM(
            params, kv_dtype="float32", max_model_len=len(ids), max_num_seqs=1, attention=name
        ).logits(ids)
        for name in ("reference", "xla")
    )
    error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    assert error < 1e-5, f"the logits have a relative error of {error}: not timed"


class LongRequest:
    """An LLM with one request whose prompt is cached. `peak_bytes` is the most cache it used."""

    def __init__(self, params: jfp8kv.Params, kv_dtype: str, prompt: list[int], output: int):
        self.llm = jfp8kv.LLM(
            params, kv_dtype=kv_dtype, max_model_len=len(prompt) + output, max_num_seqs=1
        )
        sampling = jfp8kv.SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        (group,) = self.llm._requests.build([prompt], sampling, {})
        (self.request,) = group.requests
        self.peak_bytes = 0
        self.llm.engine.add(self.request)
        while not self.request.output_ids:
            self.decode()

    def decode(self) -> None:
        """Run one scheduler step to completion."""
        self.llm.engine.step()
        self.llm.engine.settle()
        self.peak_bytes = max(self.peak_bytes, self.llm.stats.kv_bytes_used)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--tokens", type=int, default=8192, help="tokens of the prompt")
    arguments.add_argument(
        "--rounds",
        type=int,
        default=7,
        help=f"timed rounds of {DECODE_STEPS} tokens (medians are printed)",
    )
    given = arguments.parse_args()
    header()
    config = config_from_hf(yaml.safe_load(MODEL.read_text()))
    prompt = np.random.default_rng(1).integers(0, config.vocab, given.tokens).tolist()
    # One round is a warm-up, and the first decode is short.
    output = DECODE_STEPS * (given.rounds + 2)
    models = [random_params(c) for c in (config, dataclasses.replace(config, windows=()))]
    for params in models:
        check(params, prompt[: 2 * max(config.windows) + 176])  # pages of windows are reused
    rows = []
    sides: dict[str, LongRequest] = {}
    for kv_dtype in DTYPES:
        windows, full = (LongRequest(params, kv_dtype, prompt, output) for params in models)
        stats = windows.llm.stats
        without_windows = windows.llm.engine.cache_config.without_windows
        one_table = without_windows.sequence_bytes(given.tokens + output)
        assert full.peak_bytes == one_table, (
            f"without windows {full.peak_bytes} bytes are used, and {one_table} were expected"
        )
        rows.append(
            [
                kv_dtype,
                f"{windows.peak_bytes / MIB:.1f}",
                f"{one_table / MIB:.1f}",
                f"{one_table / windows.peak_bytes:.2f}x",
                f"{stats.kv_bytes_per_token:,.0f}",
                f"{stats.kv_bytes_per_token_without_windows:,.0f}",
            ]
        )
        sides[f"{kv_dtype}, windows"] = windows
        sides[f"{kv_dtype}, no windows"] = full
    columns = [
        "KV cache",
        "MiB with windows",
        "MiB with one page table",
        "ratio",
        "bytes/token",
        "without windows",
    ]
    table(f"One request of {given.tokens:,} + {output} tokens", columns, rows)

    seconds = interleaved({name: side.decode for name, side in sides.items()}, rounds=given.rounds)
    rates = {name: DECODE_STEPS / median(times) for name, times in seconds.items()}
    generated = DECODE_STEPS_DURING_PREFILL + DECODE_STEPS * (given.rounds + 1)
    assert all(len(side.request.output_ids) == generated for side in sides.values())
    rows = []
    for name, rate in rates.items():
        kv_dtype = name.split(",")[0]
        ratio = rate / rates[f"{kv_dtype}, no windows"]
        rows.append([name, f"{rate:.1f}", f"{1e3 / rate:.1f}", f"{ratio:.2f}x"])
    columns = ["model", "tokens/s", "ms/token", "against no windows"]
    table(f"Decoding after {given.tokens:,} tokens", columns, rows)


if __name__ == "__main__":
    main()
