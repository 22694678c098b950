"""The cost of forking a sequence.

    python -m benchmarks.forks

With a session of 100 tokens: one fork extended by a token; several forks, one by one and in one
dispatch; a rollback by one token; and for comparison the same sequence computed from scratch. Then
several continuations of one prompt, and beam search.
"""

from collections.abc import Callable

import numpy as np

import jfp8kv
from benchmarks._common import header, interleaved, median, parser, smollm2, table

PROMPT = 100
FORKS = 4
OUTPUT = 16


def session_calls(llm: jfp8kv.LLM, stem: jfp8kv.Session) -> dict[str, Callable[[], object]]:
    """Return what is timed of a session, by name."""

    def with_forks(count: int, extend: Callable[[list[jfp8kv.Session]], object]) -> None:
        forks = [stem.fork() for _ in range(count)]
        extend(forks)
        for fork in forks:
            fork.close()

    def one_by_one(forks: list[jfp8kv.Session]) -> None:
        for fork in forks:
            fork.extend([7])

    def at_once(forks: list[jfp8kv.Session]) -> None:
        jfp8kv.extend_batch(forks, [7] * len(forks))

    def rollback() -> None:
        stem.rollback(1)
        stem.extend([7])

    return {
        "one fork, extended by a token": lambda: with_forks(1, one_by_one),
        f"{FORKS} forks, one by one": lambda: with_forks(FORKS, one_by_one),
        f"{FORKS} forks, in one dispatch": lambda: with_forks(FORKS, at_once),
        "rollback by a token, then extend": rollback,
        "the sequence from scratch": lambda: llm.logits([*stem.token_ids, 7]),
    }


def prompt_calls(llm: jfp8kv.LLM) -> dict[str, Callable[[], object]]:
    """Return what is timed of new prompts, by name."""
    rng = np.random.default_rng(0)

    def new_prompts() -> list[list[int]]:
        return [rng.integers(1000, llm.params.config.vocab, PROMPT).tolist()]

    def generate(n: int) -> object:
        return llm.generate(new_prompts(), n=n, max_tokens=OUTPUT, temperature=1.0, ignore_eos=True)

    def beam_search() -> object:
        return jfp8kv.beam_search(
            llm, new_prompts(), beams=FORKS, max_tokens=OUTPUT, ignore_eos=True
        )

    return {
        f"{OUTPUT} tokens after a new prompt, n=1": lambda: generate(1),
        f"the same, n={FORKS}": lambda: generate(FORKS),
        f"the same by beam_search, beams={FORKS}": beam_search,
    }


def main() -> None:
    given = parser(__doc__).parse_args()
    header()
    llm = jfp8kv.LLM(
        given.model or smollm2(),
        kv_dtype="fp8_e4m3",
        kv_cache_memory="64MiB",
        max_num_seqs=16,
    )
    with llm.session(list(range(1000, 1000 + PROMPT))) as stem:
        calls = session_calls(llm, stem) | prompt_calls(llm)
        seconds = interleaved(calls, rounds=given.rounds)
    rows = [
        [name, f"{1e3 * median(times):.0f}", f"{1e3 * min(times):.0f}"]
        for name, times in seconds.items()
    ]
    table(f"A sequence of {PROMPT} tokens, E4M3", ["operation", "ms, median", "ms, min"], rows)


if __name__ == "__main__":
    main()
