"""SmolLM2 end to end: tokens per second of one stream and of 16 prompts at once, bf16 cache against FP8; time to first token.

    python -m benchmarks.throughput

Caches take turns in one process, warm: `jfp8kv bench` does the same for any model. Time to first token is measured in
processes of their own, from `import jfp8kv` on: cold (an empty compilation cache) and with the cache warm.
"""

import os
import subprocess
import sys
import tempfile

import jfp8kv
from benchmarks._common import console, header, median, parser, smollm2, table

DTYPES = ["bfloat16", "fp8_e4m3", "fp8_e5m2"]
SCENARIOS = ((1, 128, 64), (16, 128, 64))  # requests, prompt and output tokens of each
FIRST_TOKEN = """
import sys, time
began = time.perf_counter()
import jfp8kv
llm = jfp8kv.LLM(sys.argv[1], kv_dtype="fp8_e4m3", kv_cache_memory="64MiB")
loaded = time.perf_counter()
next(llm.stream("The capital of France is", max_tokens=8, temperature=0.0))
print(loaded - began, time.perf_counter() - began)
"""


def first_token(model: str, cache: str) -> tuple[float, float]:
    environment = os.environ | {"JFP8KV_CACHE_DIR": cache}
    command = [sys.executable, "-c", FIRST_TOKEN, model]
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    loaded, first = map(float, out.split())
    return loaded, first


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    model = str(given.model or smollm2())
    params = jfp8kv.load(model)
    for requests, prompt, output in SCENARIOS:
        sizes = {
            "requests": requests,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "rounds": given.rounds,
        }
        console.print(jfp8kv.bench(params, kv_dtypes=DTYPES, progress=False, **sizes))

    with tempfile.TemporaryDirectory() as cache:
        runs = {"cold": first_token(model, cache)}
        warm = [first_token(model, cache) for _ in range(3)]
    runs["compilation cache warm"] = tuple(median([run[i] for run in warm]) for i in range(2))
    rows = [[name, f"{loaded:.1f}", f"{first:.1f}"] for name, (loaded, first) in runs.items()]
    table(
        "From `import jfp8kv` in a new process, seconds",
        ["start", "model loaded", "first token"],
        rows,
    )


if __name__ == "__main__":
    main()
