"""KV memory and decode speed of a 5:1 local/global model at 8k tokens: what its windows save, under bf16 and FP8 caches.

    python -m benchmarks.windows

One request with a long prompt runs in an engine with random weights. Bytes are the most it held, `llm.stats.kv_bytes_used`.
Beside them stands what it would hold under one page table for all layers, where the layers that see everything keep the pages
of all; it is what the same model without windows is seen to hold. Then decoding, windows against none, sides in turn.
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
from jfp8kv.models.names import expected_shapes, nest

MODEL = Path(__file__).parent.parent / "configs" / "bench" / "windows.yaml"
DTYPES = ("bfloat16", "fp8_e4m3")
MIB = 2**20


def random_params(config: ModelConfig) -> jfp8kv.Params:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.05, shape) for name, shape in expected_shapes(config).items()}
    return jfp8kv.Params.from_pytree(
        nest({name: w.astype(config.dtype) for name, w in weights.items()}), config
    )


def check(params: jfp8kv.Params, ids: list[int]) -> None:
    """Compare the scores of a text with those of the plain reference.

    In a float32 cache, where both store the same: a rounder format turns the last bit of one into a step of its own.
    """
    want, got = (
        jfp8kv.LLM(
            params, kv_dtype="float32", max_model_len=len(ids), max_num_seqs=1, attention=name
        ).logits(ids)
        for name in ("reference", "xla")
    )
    error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    assert error < 1e-5, f"the scores are wrong by {error}: not timed"


class Side:
    """An engine with one request in it, whose prompt is in the cache; `held` is the most bytes it took."""

    def __init__(self, params: jfp8kv.Params, kv_dtype: str, prompt: list[int], new: int):
        self.llm = jfp8kv.LLM(
            params, kv_dtype=kv_dtype, max_model_len=len(prompt) + new, max_num_seqs=1
        )
        (group,) = self.llm._groups(
            [prompt], None, {"max_tokens": new, "temperature": 0.0, "ignore_eos": True}
        )
        (self.request,) = group.requests
        self.held_bytes = 0
        self.llm._engine.add(self.request)
        while not self.request.output_ids:
            self.decode()

    def decode(self) -> None:
        self.llm._engine.step()
        self.llm._engine.settle()
        self.held_bytes = max(self.page_tables, self.llm.stats.kv_bytes_used)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--tokens", type=int, default=8192, help="of the prompt")
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
    new = DECODE_STEPS * (
        given.rounds + 2
    )  # the first tokens are few, the first round is not counted
    models = [random_params(c) for c in (config, dataclasses.replace(config, windows=()))]
    for params in models:
        check(
            params, prompt[: 2 * max(config.windows) + 176]
        )  # long enough for pages of a window to be written again
    rows, sides = [], {}
    for kv_dtype in DTYPES:
        windows, full = (Side(params, kv_dtype, prompt, new) for params in models)
        stats = windows.llm.stats
        one_table = windows.llm._engine.cache_config.without_windows.sequence_bytes(given.tokens + new)
        assert full.held_bytes == one_table, (
            f"all layers full hold {full.held_bytes} bytes, and {one_table} were reckoned"
        )
        rows.append([
            kv_dtype, f"{windows.held_bytes / MIB:.1f}", f"{one_table / MIB:.1f}", f"{one_table / windows.page_tables:.2f}x",
            f"{stats.kv_bytes_per_token:,.0f}", f"{stats.kv_bytes_per_token_without_windows:,.0f}",
        ])  # fmt: skip
        sides |= {f"{kv_dtype}, windows": windows, f"{kv_dtype}, all layers full": full}
    columns = [
        "KV cache",
        "MiB with windows",
        "MiB under one page table",
        "times as much",
        "bytes/token",
        "without windows",
    ]
    table(f"One request of {given.tokens:,} + {new} tokens", columns, rows)

    seconds = interleaved({name: side.decode for name, side in sides.items()}, rounds=given.rounds)
    rates = {name: DECODE_STEPS / median(times) for name, times in seconds.items()}
    assert all(
        len(side.request.output_ids)
        == DECODE_STEPS_DURING_PREFILL + DECODE_STEPS * (given.rounds + 1)
        for side in sides.values()
    )
    rows = []
    for name, rate in rates.items():
        against = rate / rates[f"{name.split(',')[0]}, all layers full"]
        rows.append([name, f"{rate:.1f}", f"{1e3 / rate:.1f}", f"{against:.2f}x"])
    table(
        f"Decoding after {given.tokens:,} tokens",
        ["model", "tokens/s", "ms/token", "against all layers full"],
        rows,
    )


if __name__ == "__main__":
    main()
