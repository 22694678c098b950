"""What the host costs: 64 requests decode on SmolLM2, and the device waits for nobody, or nearly.

    python -m benchmarks.host_overhead

A turn goes round like this: the device is done; the host books tokens, plans, builds and dispatches the next turn (*the device
waits*); while that runs it makes texts (*overlapped*). Both are timed in every turn. The share "without overlap" is what the
same work would take if the device waited for all of it. As a check the dispatches run again without an engine around them, with
the arrays that it built: what an engine takes longer is the host's. Full decodes count alone, eight tokens of every request.
"""

import time
from typing import Any

import jax
import numpy as np

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table
from jfp8kv import SamplingParams
from jfp8kv.engine import step
from jfp8kv.engine.buckets import DECODE_STEPS

ASKED = {
    "greedy": {"temperature": 0.0},
    "top-p, three stop strings": {
        "temperature": 0.8,
        "top_p": 0.9,
        "stop": ["\n\nQ:", "###", "</end>"],
    },
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}


class Watched:
    """An engine's dispatches: when each was handed over, and with which arrays."""

    def __init__(self, llm: jfp8kv.LLM):
        self.engine, self.call = llm._engine, llm._engine.programs.call
        self.engine.programs.call = self
        self.seen: list[tuple[float, Any, dict]] = []

    def __call__(self, function: Any, batch: Any, pages: Any, **static: Any) -> Any:
        out = self.call(function, batch, pages, **static)
        self.seen.append((time.perf_counter(), batch if function is step.decode else None, static))
        return out

    def alone(self, batch: Any, static: dict) -> float:
        """Seconds of one dispatch, run again: it writes what is there."""
        began = time.perf_counter()
        output, self.engine.pages = self.call(step.decode, batch, self.engine.pages, **static)
        jax.block_until_ready(output)
        return time.perf_counter() - began


def measure(
    llm: jfp8kv.LLM, requests: int, turns: int, fields: dict[str, Any]
) -> list[list[float]]:
    """Seconds of each turn: the device waits, overlapped, all of it; and those of its dispatch run again without an engine."""
    watched, engine = Watched(llm), llm._engine
    prompts = np.random.default_rng(0).integers(20, 40_000, (requests, 8)).tolist()
    sampling = SamplingParams(
        max_tokens=DECODE_STEPS * (turns + 3), ignore_eos=True, seed=0, **fields
    )
    for group in llm._groups(prompts, sampling, {}):
        engine.add(group.requests[0])
    waits, overlapped, ends, batches = [], [], [], []
    while engine.scheduler.waiting or engine.scheduler.running:
        jax.block_until_ready([flight.output for flight in engine._flying])
        ready, before = time.perf_counter(), len(watched.seen)
        engine.step()
        told = time.perf_counter()
        full = len(watched.seen) == before + 1 and watched.seen[-1][1] is not None
        if full and watched.seen[-1][1].steps == DECODE_STEPS:
            dispatched, batch, static = watched.seen[-1]
            waits.append(dispatched - ready)
            overlapped.append(told - dispatched)
            ends.append(ready)
            batches.append((batch, static))
    alone = [watched.alone(*each) for each in batches]
    engine.programs.call = watched.call
    return [waits, overlapped, np.diff(ends).tolist(), alone]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=64)
    arguments.add_argument(
        "--turns", type=int, default=8, help="of eight tokens each that are timed"
    )
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    sizes = {"max_model_len": 256, "max_num_seqs": given.requests, "kv_cache_memory": "512MiB"}
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **sizes)
    rows = []
    for name, fields in ASKED.items():
        measure(llm, given.requests, 1, fields)  # compiles
        waits, overlapped, turn, alone = map(
            median, measure(llm, given.requests, given.turns, fields)
        )
        device = turn - waits
        rows.append([
            name, f"{1e3 * waits / DECODE_STEPS:.2f}", f"{1e6 * waits / DECODE_STEPS / given.requests:.1f}",
            f"{1e3 * overlapped / DECODE_STEPS:.2f}", f"{1e3 * turn / DECODE_STEPS:.1f}", f"{1e3 * alone / DECODE_STEPS:.1f}",
            f"{(waits + overlapped) / (waits + overlapped + device):.1%}", f"{waits / turn:.1%}",
        ])  # fmt: skip
    columns = [
        "sampling", "device waits ms/step", "us/token", "overlapped ms/step", "step ms", "alone ms", "without overlap", "share"
    ]  # fmt: skip
    table(
        f"{given.requests} requests, {DECODE_STEPS} tokens of each in a turn; medians of turns",
        columns,
        rows,
    )


if __name__ == "__main__":
    main()
