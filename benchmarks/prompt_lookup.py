"""Prompt lookup: tokens per second with 0, 2, 4 and 8 draft tokens, on a text to copy from and on a free one.

    python -m benchmarks.prompt_lookup

Sides take turns in one process, warm. A pass that verifies K drafts runs K + 1 tokens of every request where a plain one runs
one, so what it pays depends on what the wider pass costs: little where reading weights is what takes time (one request, a GPU
with room), up to K + 1 times as much where products are (many requests on a CPU). Where nothing
repeats itself, passes stay plain.
"""

import itertools

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table, text_of

DRAFTS = (0, 2, 4, 8)
FREE = (
    "a lighthouse",
    "an old clock",
    "the last train",
    "a garden in winter",
    "two brothers",
    "a lost letter",
    "rain",
    "a ship",
)


def copying(text: str, count: int) -> list:
    """Chats that ask for a paragraph again."""
    paragraphs = [p.replace("\n", " ") for p in text.split("\n\n") if 300 < len(p) < 900 and "|" not in p and "```" not in p]
    ask = "Correct the spelling of the following text and write out all of it:\n\n"
    return [[{"role": "user", "content": ask + p}] for p in itertools.islice(itertools.cycle(paragraphs), count)]


def free(count: int) -> list:
    return [[{"role": "user", "content": f"Write a story about {about}."}] for about in FREE[:count]]


def run(llm: jfp8kv.LLM, chats: list, tokens: int, temperature: float) -> tuple[float, float, float]:
    """Output tokens per second of decoding; the share of drafts accepted; tokens per request and pass."""
    before = llm.stats.to_dict()
    llm.chat(chats, max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True, progress=False)
    spent = {name: value - before[name] for name, value in llm.stats.to_dict().items()}
    made, accepted = spent["generated_tokens"], spent["accepted_tokens"]
    return made / spent["decode_s"], accepted / max(1, spent["draft_tokens"]), made / (made - accepted)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--text", help="a text file to copy from (default: the documentation of this repository)")
    arguments.add_argument("--tokens", type=int, default=128, help="tokens each request makes")
    arguments.add_argument("--requests", type=int, nargs="+", default=[1, 8], help="how many at once")
    given = arguments.parse_args()
    header()
    params, text = jfp8kv.load(given.model or smollm2()), text_of(given.text)
    sizes = {"kv_cache_dtype": "fp8_e4m3", "kv_cache_memory": "128MiB", "max_model_len": 2048}
    llms = {drafts: jfp8kv.LLM(params, prompt_lookup=drafts, **sizes) for drafts in DRAFTS}
    rows = []
    for requests in given.requests:
        for name, chats, temperature in (("copy", copying(text, requests), 0.0), ("free", free(requests), 0.8)):
            runs = {drafts: [] for drafts in DRAFTS}
            for turn in range(given.rounds + 1):
                for drafts, llm in llms.items():
                    result = run(llm, chats, given.tokens, temperature)
                    runs[drafts] += [result] if turn else []
            plain = median([rate for rate, _, _ in runs[0]])
            for drafts in DRAFTS:
                rate, share, made = (median([r[i] for r in runs[drafts]]) for i in range(3))
                rows.append([
                    f"{name}, {requests} at once, K={drafts}", f"{rate:.1f}", f"{rate / plain:.2f}",
                    f"{share:.0%}" if drafts else "", f"{made:.2f}",
                ])  # fmt: skip
    columns = ["prompt", "decode tok/s", "to K=0", "drafts accepted", "tokens a pass"]
    table(f"SmolLM2, E4M3, {given.tokens} tokens each, medians", columns, rows)


if __name__ == "__main__":
    main()
