"""SmolLM2 end to end: tokens per second of one stream and of 16 prompts at once, bf16 cache against FP8; time to first token.

    python -m benchmarks.throughput

Sides take turns in one process, warm. Time to first token is measured in processes of their own, from `import jfp8kv` on: cold
(an empty compilation cache) and with the cache warm.
"""

import os
import subprocess
import sys
import tempfile
import time

import numpy as np

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table

DTYPES = ("bfloat16", "fp8_e4m3", "fp8_e5m2")
SCENARIOS = {"1 x 128 + 64": (1, 128, 64), "16 x 128 + 64": (16, 128, 64)}
FIRST_TOKEN = """
import sys, time
began = time.perf_counter()
import jfp8kv
llm = jfp8kv.LLM(sys.argv[1], kv_cache_dtype="fp8_e4m3", kv_cache_memory="64MiB")
loaded = time.perf_counter()
next(llm.stream("The capital of France is", max_tokens=8, temperature=0.0))
print(loaded - began, time.perf_counter() - began)
"""


def prompts(requests: int, length: int, turn: int) -> list[list[int]]:
    return np.random.default_rng(turn).integers(20, 40_000, (requests, length)).tolist()


def decode_rate(llm: jfp8kv.LLM, requests: int, length: int, new: int, turn: int) -> tuple[float, float, float]:
    """Tokens per second: all of them over the whole run, prompt tokens in prefill, output tokens in decode."""
    before = llm.stats.to_dict()
    began = time.perf_counter()
    llm.generate(prompts(requests, length, turn), max_tokens=new, temperature=0.0, ignore_eos=True, progress=False)
    total = time.perf_counter() - began
    spent = {name: value - before[name] for name, value in llm.stats.to_dict().items()}
    return (
        requests * (length + new) / total,
        requests * (length - 1) / spent["prefill_s"],
        requests * new / spent["decode_s"],
    )


def first_token(model: str, cache: str) -> tuple[float, float]:
    environment = os.environ | {"JFP8KV_CACHE_DIR": cache}
    command = [sys.executable, "-c", FIRST_TOKEN, model]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    loaded, first = map(float, out.split())
    return loaded, first


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    model = str(given.model or smollm2())
    params = jfp8kv.load(model)
    llms = {d: jfp8kv.LLM(params, kv_cache_dtype=d, kv_cache_memory="256MiB", max_model_len=2048) for d in DTYPES}
    rows = []
    for name, scenario in SCENARIOS.items():
        rates = {d: [] for d in DTYPES}
        for turn in range(given.rounds + 1):
            for d, llm in llms.items():
                rate = decode_rate(llm, *scenario, turn)
                rates[d] += [rate] if turn else []
        for d in DTYPES:
            total, prefill, decode = (median([r[i] for r in rates[d]]) for i in range(3))
            kv = llms[d].stats.kv_bytes_per_token
            rows.append([f"{name}, {d}", f"{total:.1f}", f"{prefill:.0f}", f"{decode:.1f}", f"{kv:.0f}", f"{2**30 / kv:,.0f}"])
    columns = [
        "requests x prompt + output",
        "tokens/s",
        "prefill tok/s",
        "decode tok/s",
        "KV bytes/token",
        "tokens per GiB",
    ]
    table("Throughput, medians", columns, rows)

    with tempfile.TemporaryDirectory() as cache:
        runs = {"cold": first_token(model, cache)}
        warm = [first_token(model, cache) for _ in range(3)]
    runs["compilation cache warm"] = tuple(median([run[i] for run in warm]) for i in range(2))
    rows = [[name, f"{loaded:.1f}", f"{first:.1f}"] for name, (loaded, first) in runs.items()]
    table("From `import jfp8kv` in a new process, seconds", ["start", "model loaded", "first token"], rows)


if __name__ == "__main__":
    main()
