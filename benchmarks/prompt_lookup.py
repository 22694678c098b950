"""Prompt lookup: tokens per second with 0, 2, 4 and 8 draft tokens, on a text to copy from and on a free one.

    python -m benchmarks.prompt_lookup
    python -m benchmarks.prompt_lookup --rules

Sides take turns in one process, warm. A pass that verifies K drafts runs K + 1 tokens of every request where a plain one runs
one, so what it pays depends on what the wider pass costs: little where reading weights is what takes time (one request, a GPU
with room), up to K + 1 times as much where products are (many requests on a CPU). Where nothing repeats
itself, passes stay plain.

`--rules` compares rules instead: which earlier occurrences of a text's end are worth a wide pass, for texts that plain decoding
made.
"""

import itertools
import time

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table, text_of

DRAFTS = (0, 2, 4, 8)
SIZES = {"kv_dtype": "fp8_e4m3", "kv_cache_memory": "128MiB", "max_model_len": 2048}
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
    paragraphs = [
        p.replace("\n", " ")
        for p in text.split("\n\n")
        if 300 < len(p) < 900 and "|" not in p and "```" not in p
    ]
    ask = "Correct the spelling of the following text and write out all of it:\n\n"
    return [
        [{"role": "user", "content": ask + p}]
        for p in itertools.islice(itertools.cycle(paragraphs), count)
    ]


def free(count: int) -> list:
    return [
        [{"role": "user", "content": f"Write a story about {about}."}] for about in FREE[:count]
    ]


def run(
    llm: jfp8kv.LLM, chats: list, tokens: int, temperature: float
) -> tuple[float, float, float, float]:
    """Output tokens per second of decoding; processor time per token, in ms; the share of drafts accepted; tokens made in a
    pass for each that plain decoding makes."""
    before, began = llm.stats.to_dict(), time.process_time()
    llm.chat(
        chats, max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True, progress=False
    )
    busy = time.process_time() - began
    spent = {name: value - before[name] for name, value in llm.stats.to_dict().items()}
    made, accepted = spent["generated_tokens"], spent["accepted_tokens"]
    tried = max(1, spent["draft_tokens"])
    return made / spent["decode_s"], 1000 * busy / made, accepted / tried, made / (made - accepted)


def drafted(text: list[int], drafts: int, least: int, most: int) -> list[int]:
    """What `engine/lookup.py` drafts for occurrences of at least `least` and up to `most` tokens; nothing without one."""
    for length in range(min(most, len(text) - 1), least - 1, -1):
        end = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == end:
                after = text[start + length :]
                return list(itertools.islice(itertools.cycle(after), drafts))
    return []


def replayed(
    prompt: list[int], output: list[int], drafts: int, least: int, most: int
) -> tuple[int, int, int, int]:
    """Passes it takes to make `output`, those of them that are wide, drafts run and drafts accepted."""
    passes = wide = run = accepted = at = 0
    while at < len(output):
        guess = drafted(prompt + output[:at], drafts, least, most)
        right = sum(
            1
            for _ in itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(guess, output[at:], strict=False)
            )
        )
        passes, wide, run, accepted, at = (
            passes + 1,
            wide + bool(guess),
            run + len(guess),
            accepted + right,
            at + right + 1,
        )
    return passes, wide, run, accepted


def rules(params: jfp8kv.Params, text: str, tokens: int) -> None:
    llm, rows = jfp8kv.LLM(params, **SIZES), []
    for name, chats, temperature in (
        ("copy", copying(text, 8), 0.0),
        ("free", free(8), 0.8),
        ("free, greedy", free(8), 0.0),
    ):
        outs = llm.chat(
            chats,
            max_tokens=tokens,
            temperature=temperature,
            seed=1,
            ignore_eos=True,
            progress=False,
        )
        for drafts, (least, most) in itertools.product(
            (4, 8), ((1, 3), (2, 3), (3, 3), (3, 6), (4, 4))
        ):
            each = [
                replayed(out.prompt_token_ids, out.token_ids, drafts, least, most) for out in outs
            ]
            passes, wide, run, accepted = map(sum, zip(*each, strict=True))
            rows.append([
                f"{name}, K={drafts}, {least} to {most} tokens", f"{len(outs) * tokens / passes:.2f}", f"{wide / passes:.0%}",
                f"{accepted / max(1, run):.0%}", f"{accepted / max(1, wide):.2f}",
            ])  # fmt: skip
    columns = [
        "prompt, rule",
        "tokens a pass",
        "wide passes",
        "drafts accepted",
        "accepted a wide pass",
    ]
    table(f"Replayed: 8 texts of {tokens} tokens each", columns, rows)


def speeds(params: jfp8kv.Params, text: str, each: list[int], tokens: int, rounds: int) -> None:
    llms = {drafts: jfp8kv.LLM(params, prompt_lookup=drafts, **SIZES) for drafts in DRAFTS}
    rows = []
    for requests in each:
        for name, chats, temperature in (
            ("copy", copying(text, requests), 0.0),
            ("free", free(requests), 0.8),
        ):
            runs = {drafts: [] for drafts in DRAFTS}
            for turn in range(rounds + 1):
                for drafts, llm in llms.items():
                    result = run(llm, chats, tokens, temperature)
                    runs[drafts] += [result] if turn else []
            plain = median([run[0] for run in runs[0]])
            for drafts in DRAFTS:
                rate, busy, share, made = (
                    median([run[i] for run in runs[drafts]]) for i in range(4)
                )
                rows.append([
                    f"{name}, {requests} at once, K={drafts}", f"{rate:.1f}", f"{rate / plain:.2f}", f"{busy:.1f}",
                    f"{share:.0%}" if drafts else "", f"{made:.2f}",
                ])  # fmt: skip
    columns = [
        "prompt",
        "decode tok/s",
        "to K=0",
        "CPU ms a token",
        "drafts accepted",
        "tokens a pass",
    ]
    table(f"SmolLM2, E4M3, {tokens} tokens each, medians", columns, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--text", help="a text file to copy from (default: the documentation of this repository)"
    )
    arguments.add_argument("--tokens", type=int, default=128, help="tokens each request makes")
    arguments.add_argument(
        "--requests", type=int, nargs="+", default=[1, 8], help="how many at once"
    )
    arguments.add_argument(
        "--rules", action="store_true", help="compare rules by the texts that plain decoding makes"
    )
    given = arguments.parse_args()
    header()
    params, text = jfp8kv.load(given.model or smollm2()), text_of(given.text)
    if given.rules:
        rules(params, text, given.tokens)
    else:
        speeds(params, text, given.requests, given.tokens, given.rounds)


if __name__ == "__main__":
    main()
