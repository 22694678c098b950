"""Prompt lookup: tokens per second with 0, 2, 4 and 8 draft tokens, for copied and for free text.

    python -m benchmarks.prompt_lookup
    python -m benchmarks.prompt_lookup --rules

The configurations are interleaved in one process, warm. A pass that verifies K draft tokens runs
K + 1 tokens of each request. Its cost is small where reading the weights takes the time (one
request, a GPU with capacity left), and up to K + 1 times that of a plain pass where matmuls do
(many requests on a CPU). Where nothing repeats, passes stay plain.

`--rules` compares rules for drafts instead: the lengths of a match that are worth a wide pass, on
the outputs of plain decoding.
"""

import dataclasses
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
    """Return chats that ask to repeat a paragraph."""
    paragraphs = [
        p.replace("\n", " ")
        for p in text.split("\n\n")
        if 300 < len(p) < 900 and "|" not in p and "```" not in p
    ]
    request = "Correct the spelling of the following text and write out all of it:\n\n"
    return [
        [{"role": "user", "content": request + p}]
        for p in itertools.islice(itertools.cycle(paragraphs), count)
    ]


def free(count: int) -> list:
    """Return chats that ask for a story."""
    return [
        [{"role": "user", "content": f"Write a story about {about}."}] for about in FREE[:count]
    ]


def run(
    llm: jfp8kv.LLM, chats: list, tokens: int, temperature: float
) -> tuple[float, float, float, float]:
    """Run the chats.

    Returns output tokens per second of decoding, CPU milliseconds per token, the share of accepted
    draft tokens, and output tokens per pass.
    """
    before = llm.stats.to_dict()
    started = time.process_time()
    llm.chat(
        chats, max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True, progress=False
    )
    cpu_seconds = time.process_time() - started
    change = {name: value - before[name] for name, value in llm.stats.to_dict().items()}
    generated, accepted = change["generated_tokens"], change["accepted_tokens"]
    return (
        generated / change["decode_s"],
        1000 * cpu_seconds / generated,
        accepted / max(1, change["draft_tokens"]),
        generated / (generated - accepted),
    )


def draft(sequence: list[int], count: int, shortest: int, longest: int) -> list[int]:
    """Return the draft of engine/speculative.py for a match of `shortest` to `longest` tokens.

    Empty if nothing matches.
    """
    for length in range(min(longest, len(sequence) - 1), shortest - 1, -1):
        suffix = sequence[-length:]
        for start in range(len(sequence) - length - 1, -1, -1):
            if sequence[start : start + length] == suffix:
                after = sequence[start + length :]
                return list(itertools.islice(itertools.cycle(after), count))
    return []


@dataclasses.dataclass
class Replay:
    """Counts of passes and draft tokens."""

    passes: int = 0
    wide: int = 0
    verified: int = 0
    accepted: int = 0

    def add(
        self, prompt: list[int], output: list[int], count: int, shortest: int, longest: int
    ) -> None:
        """Count the passes that generate `output` with drafts of `count` tokens."""
        at = 0
        while at < len(output):
            tokens = draft(prompt + output[:at], count, shortest, longest)
            pairs = zip(tokens, output[at:], strict=False)
            right = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            self.passes += 1
            self.wide += bool(tokens)
            self.verified += len(tokens)
            self.accepted += right
            at += right + 1


def rules(params: jfp8kv.Params, text: str, tokens: int) -> None:
    """Print the passes that different rules for drafts would take."""
    llm = jfp8kv.LLM(params, **SIZES)
    sampling = {"max_tokens": tokens, "seed": 1, "ignore_eos": True}
    workloads = [
        ("copy", copying(text, 8), 0.0),
        ("free", free(8), 0.8),
        ("free, greedy", free(8), 0.0),
    ]
    matches = [(1, 3), (2, 3), (3, 3), (3, 6), (4, 4)]
    rows = []
    for name, chats, temperature in workloads:
        outs = llm.chat(chats, temperature=temperature, progress=False, **sampling)
        for count, (shortest, longest) in itertools.product((4, 8), matches):
            replay = Replay()
            for out in outs:
                replay.add(out.prompt_token_ids, out.token_ids, count, shortest, longest)
            rows.append(
                [
                    f"{name}, K={count}, {shortest} to {longest} tokens",
                    f"{len(outs) * tokens / replay.passes:.2f}",
                    f"{replay.wide / replay.passes:.0%}",
                    f"{replay.accepted / max(1, replay.verified):.0%}",
                    f"{replay.accepted / max(1, replay.wide):.2f}",
                ]
            )
    columns = [
        "prompt, rule",
        "tokens per pass",
        "wide passes",
        "drafts accepted",
        "accepted per wide pass",
    ]
    table(f"Replayed: 8 outputs of {tokens} tokens each", columns, rows)


def speeds(
    params: jfp8kv.Params, text: str, batch_sizes: list[int], tokens: int, rounds: int
) -> None:
    """Print the speed of decoding with different numbers of draft tokens."""
    llms = {drafts: jfp8kv.LLM(params, prompt_lookup=drafts, **SIZES) for drafts in DRAFTS}
    rows = []
    for requests in batch_sizes:
        workloads = [("copy", copying(text, requests), 0.0), ("free", free(requests), 0.8)]
        for name, chats, temperature in workloads:
            runs = {drafts: [] for drafts in DRAFTS}
            for number in range(rounds + 1):
                for drafts, llm in llms.items():
                    result = run(llm, chats, tokens, temperature)
                    if number:  # the first round is a warm-up
                        runs[drafts].append(result)
            plain = median([result[0] for result in runs[0]])
            for drafts in DRAFTS:
                rate, cpu_ms, share, per_pass = map(median, zip(*runs[drafts], strict=True))
                rows.append(
                    [
                        f"{name}, {requests} requests, K={drafts}",
                        f"{rate:.1f}",
                        f"{rate / plain:.2f}",
                        f"{cpu_ms:.1f}",
                        f"{share:.0%}" if drafts else "",
                        f"{per_pass:.2f}",
                    ]
                )
    columns = [
        "prompt",
        "decode tok/s",
        "to K=0",
        "CPU ms per token",
        "drafts accepted",
        "tokens per pass",
    ]
    table(f"SmolLM2, E4M3, {tokens} tokens each, medians", columns, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--text", help="a text file to copy from (default: the documentation of this repository)"
    )
    arguments.add_argument("--tokens", type=int, default=128, help="output tokens of each request")
    arguments.add_argument(
        "--requests", type=int, nargs="+", default=[1, 8], help="requests in a batch"
    )
    arguments.add_argument(
        "--rules", action="store_true", help="compare rules for drafts on outputs of plain decoding"
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
