"""What branching a text costs.

    python -m benchmarks.branches

A session of 100 tokens: a fork of it that goes on by a token, several that do, one after another and in one dispatch, a text
taken back by a token; beside that, the same text run anew. Then several continuations of one prompt, and beam search.
"""

from collections.abc import Callable

import numpy as np

import jfp8kv
from benchmarks._common import header, interleaved, median, parser, smollm2, table

TOKENS, BRANCHES, MADE = 100, 4, 16


def of_a_session(llm: jfp8kv.LLM, stem: jfp8kv.Session) -> dict[str, Callable[[], object]]:
    def forks(count: int, go_on: Callable[[list[jfp8kv.Session]], object]) -> None:
        branches = [stem.fork() for _ in range(count)]
        go_on(branches)
        for branch in branches:
            branch.close()

    def taken_back() -> None:
        stem.rollback(1)
        stem.extend([7])

    return {
        "a fork goes on by a token": lambda: forks(1, lambda branches: branches[0].extend([7])),
        f"{BRANCHES} forks do, one by one": lambda: forks(
            BRANCHES, lambda all_: [each.extend([7]) for each in all_]
        ),
        f"{BRANCHES} forks do, at once": lambda: forks(
            BRANCHES, lambda all_: jfp8kv.extend_batch(all_, [7] * BRANCHES)
        ),
        "a token is taken back, another run": taken_back,
        "the text run anew": lambda: llm.logits([*stem.token_ids, 7]),
    }


def of_prompts(llm: jfp8kv.LLM) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)

    def new() -> list[list[int]]:
        return [rng.integers(1000, llm.params.config.vocab, TOKENS).tolist()]

    sampled = {"max_tokens": MADE, "temperature": 1.0, "ignore_eos": True}
    searched = {"max_tokens": MADE, "ignore_eos": True}
    return {
        f"{MADE} tokens after a new prompt, n=1": lambda: llm.generate(new(), n=1, **sampled),
        f"the same, n={BRANCHES}": lambda: llm.generate(new(), n=BRANCHES, **sampled),
        f"the same by beam_search, beams={BRANCHES}": lambda: jfp8kv.beam_search(
            llm, new(), beams=BRANCHES, **searched
        ),
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
    with llm.session(list(range(1000, 1000 + TOKENS))) as stem:
        sides = of_a_session(llm, stem) | of_prompts(llm)
        seconds = interleaved(sides, rounds=given.rounds)
    rows = [
        [name, f"{1e3 * median(times):.0f}", f"{1e3 * min(times):.0f}"]
        for name, times in seconds.items()
    ]
    table(f"a text of {TOKENS} tokens, E4M3", ["what", "ms, median", "least"], rows)


if __name__ == "__main__":
    main()
