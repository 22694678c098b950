"""The effect of prefix caching and of preemption.

    python -m benchmarks.sharing

First: prompts with a long common prefix, with prefix caching on and off; time to first token. Then:
a load that needs more memory than there is, against enough memory, in bfloat16 and in FP8 *at the
same bytes*; tokens per second and preemptions.
"""

import time

import numpy as np

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table, text_of

PREFIX = 1000  # tokens that all prompts share
SUFFIX = 24  # tokens in which they differ
REQUESTS = 64
PROMPT = 64  # tokens of each prompt under memory pressure


def with_common_prefix(ids: list[int], count: int) -> list[list[int]]:
    """Return prompts that share their first `PREFIX` tokens."""
    starts = range(PREFIX, PREFIX + count * SUFFIX, SUFFIX)
    return [ids[:PREFIX] + ids[start : start + SUFFIX] for start in starts]


def generate(
    llm: jfp8kv.LLM, prompts: list[list[int]], max_tokens: int
) -> tuple[float, list[float]]:
    """Return the seconds for all requests, and for each request's first token."""
    started = time.perf_counter()
    outs = llm.generate(
        prompts, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, progress=False
    )
    seconds = time.perf_counter() - started
    return seconds, [out.first_token_s for out in outs if out.first_token_s is not None]


def prefix_caching(params: jfp8kv.Params, ids: list[int], requests: int) -> None:
    """Print times to first token with prefix caching off and on."""
    prompts = with_common_prefix(ids, requests)
    rows = []
    for enabled in (False, True):
        llm = jfp8kv.LLM(
            params, kv_dtype="fp8_e4m3", kv_cache_memory="1GiB", prefix_caching=enabled
        )
        generate(llm, [prompt[::-1] for prompt in prompts[:2]], 2)  # compiles
        seconds, first = generate(llm, prompts, 2)
        rows.append(
            [
                "on" if enabled else "off",
                f"{min(first):.2f}",
                f"{median(first):.2f}",
                f"{max(first):.2f}",
                f"{seconds:.2f}",
                f"{llm.stats.prefix_hit_tokens:,}",
            ]
        )
    columns = ["prefix caching", "first token s, min", "median", "max", "all s", "tokens hit"]
    title = f"{requests} prompts with a common prefix of {PREFIX} tokens, {SUFFIX} tokens each"
    table(title, columns, rows)


def memory_pressure(params: jfp8kv.Params, ids: list[int], requests: int, output: int) -> None:
    """Print throughput and preemptions with enough and with too little memory."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(ids) - PROMPT, requests)
    prompts = [ids[start : start + PROMPT] for start in starts]
    probe = jfp8kv.LLM(params, kv_dtype="bfloat16", kv_cache_memory="64MiB")
    enough = requests * probe.engine.cache_config.sequence_bytes(PROMPT + output)
    budgets = {"enough": enough, "half of bfloat16's need": enough // 2, "a quarter": enough // 4}
    rows = []
    for kv_dtype in ("bfloat16", "fp8_e4m3"):
        for label, memory in budgets.items():
            llm = jfp8kv.LLM(
                params,
                kv_dtype=kv_dtype,
                kv_cache_memory=memory,
                max_num_seqs=requests,
                max_model_len=PROMPT + output,
                prefix_caching=False,
            )
            generate(llm, prompts, output)  # compiles
            before = llm.stats.preemptions
            seconds, _ = generate(llm, prompts, output)
            rows.append(
                [
                    f"{kv_dtype}, {label}",
                    f"{memory / 2**20:.0f}",
                    f"{requests * output / seconds:.1f}",
                    f"{llm.stats.preemptions - before}",
                ]
            )
    columns = ["cache, memory", "MiB", "output tokens/s", "preemptions"]
    table(f"{requests} requests of {PROMPT} + {output} tokens, all at once", columns, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--text", help="a text file (default: the documentation of this repository)"
    )
    arguments.add_argument("--requests", type=int, default=REQUESTS)
    arguments.add_argument(
        "--output", type=int, default=192, help="output tokens per request under memory pressure"
    )
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    ids = params.tokenizer.encode(text_of(given.text))
    prefix_caching(params, ids, given.requests)
    memory_pressure(params, ids, given.requests // 4, given.output)


if __name__ == "__main__":
    main()
