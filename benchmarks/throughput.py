"""SmolLM2 end to end: tokens per second with a bf16 and with an FP8 cache, and time to first token.

    python -m benchmarks.throughput

One stream and 16 prompts at once. Caches are interleaved in one warm process: `jfp8kv bench` does
the same for any model. Time to first token is measured in new processes, from `import jfp8kv` on:
cold (an empty compilation cache) and with a warm compilation cache.
"""

import os
import subprocess
import sys
import tempfile

import jfp8kv
from benchmarks._common import console, header, median, parser, smollm2, table

DTYPES = ["bfloat16", "fp8_e4m3", "fp8_e5m2"]
SCENARIOS = ((1, 128, 64), (16, 128, 64))  # requests, prompt tokens, output tokens
FIRST_TOKEN = """
import sys, time
started = time.perf_counter()
import jfp8kv
llm = jfp8kv.LLM(sys.argv[1], kv_dtype="fp8_e4m3", kv_cache_memory="64MiB")
loaded = time.perf_counter()
next(llm.stream("The capital of France is", max_tokens=8, temperature=0.0))
print(loaded - started, time.perf_counter() - started)
"""


def first_token(model: str, compilation_cache: str) -> tuple[float, float]:
    """Return the seconds to a loaded model and to the first token, in a new process."""
    out = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN, model],
        env=os.environ | {"JFP8KV_CACHE_DIR": compilation_cache},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    loaded, first = (float(seconds) for seconds in out.split())
    return loaded, first


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    model = str(given.model or smollm2())
    params = jfp8kv.load(model)
    for requests, prompt, output in SCENARIOS:
        report = jfp8kv.bench(
            params,
            kv_dtypes=DTYPES,
            requests=requests,
            prompt_tokens=prompt,
            output_tokens=output,
            rounds=given.rounds,
            progress=False,
        )
        console.print(report)

    with tempfile.TemporaryDirectory() as folder:
        cold = first_token(model, folder)
        warm = [first_token(model, folder) for _ in range(3)]
    warm_median = median([run[0] for run in warm]), median([run[1] for run in warm])
    rows = [
        [name, f"{loaded:.1f}", f"{first:.1f}"]
        for name, (loaded, first) in (("cold", cold), ("compilation cache warm", warm_median))
    ]
    title = "From `import jfp8kv` in a new process, seconds"
    table(title, ["start", "model loaded", "first token"], rows)


if __name__ == "__main__":
    main()
