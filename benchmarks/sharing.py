"""What prefix reuse and preemption are worth.

    python -m benchmarks.sharing

First: prompts that share a long beginning, with and without reuse; the time to the first token. Then: a load that needs twice
the memory there is, against enough memory, in bfloat16 and in FP8 *at the same bytes*; tokens per second and preemptions.
"""

import time

import numpy as np

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table, text_of

SHARED, OWN, REQUESTS = 1000, 24, 64


def prompts(tokenizer, text: str, count: int, shared: int, own: int) -> list[list[int]]:
    ids = tokenizer.encode(text)
    return [ids[:shared] + ids[shared + i * own : shared + (i + 1) * own] for i in range(count)]


def timed(llm: jfp8kv.LLM, asked: list[list[int]], max_tokens: int) -> tuple[float, list[float]]:
    """Seconds for all, and each request's to its first token."""
    began = time.perf_counter()
    outs = llm.generate(
        asked, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, progress=False
    )
    return time.perf_counter() - began, [out.first_token_s for out in outs]


def reuse(params: jfp8kv.Params, text: str, requests: int) -> None:
    asked = prompts(params.tokenizer, text, requests, SHARED, OWN)
    rows = []
    for sharing in (False, True):
        llm = jfp8kv.LLM(
            params, kv_dtype="fp8_e4m3", kv_cache_memory="1GiB", prefix_caching=sharing
        )
        timed(llm, [ids[::-1] for ids in asked[:2]], 2)  # compiles
        seconds, first = timed(llm, asked, 2)
        rows.append([
            "on" if sharing else "off", f"{min(first):.2f}", f"{median(first):.2f}", f"{max(first):.2f}", f"{seconds:.2f}",
            f"{llm.stats.prefix_hit_tokens:,}",
        ])  # fmt: skip
    columns = ["prefix reuse", "first token s: least", "median", "most", "all s", "tokens not run"]
    table(
        f"{requests} prompts of {SHARED} tokens alike and {OWN} of their own, 2 tokens each",
        columns,
        rows,
    )


def pressure(params: jfp8kv.Params, text: str, requests: int, output: int) -> None:
    ids = params.tokenizer.encode(text)
    rng = np.random.default_rng(0)
    asked = [ids[start : start + 64] for start in rng.integers(0, len(ids) - 64, requests)]
    probe = jfp8kv.LLM(params, kv_dtype="bfloat16", kv_cache_memory="64MiB")._engine
    whole = requests * probe.kv.sequence_bytes(64 + output)
    rows = []
    for name in ("bfloat16", "fp8_e4m3"):
        for label, memory in (
            ("enough", whole),
            ("half of what bfloat16 needs", whole // 2),
            ("a quarter", whole // 4),
        ):
            sizes = {
                "kv_cache_memory": memory,
                "max_num_seqs": requests,
                "max_model_len": 64 + output,
            }
            llm = jfp8kv.LLM(params, kv_dtype=name, prefix_caching=False, **sizes)
            timed(llm, asked, output)  # compiles what the same requests need again
            before = llm.stats.preemptions
            seconds, _ = timed(llm, asked, output)
            rows.append([
                f"{name}, {label}", f"{memory / 2**20:.0f}", f"{requests * output / seconds:.1f}",
                f"{llm.stats.preemptions - before}",
            ])  # fmt: skip
    columns = ["cache, memory", "MiB", "output tok/s", "preemptions"]
    table(f"{requests} requests of 64 + {output} tokens, all at once", columns, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--text", help="a text file (default: the documentation of this repository)"
    )
    arguments.add_argument("--requests", type=int, default=REQUESTS)
    arguments.add_argument(
        "--output", type=int, default=192, help="tokens each request makes under pressure"
    )
    given = arguments.parse_args()
    header()
    params, text = jfp8kv.load(given.model or smollm2()), text_of(given.text)
    reuse(params, text, given.requests)
    pressure(params, text, given.requests // 4, given.output)


if __name__ == "__main__":
    main()
