"""Host time per step: 64 requests decode on SmolLM2, and the device hardly waits for the host.

    python -m benchmarks.host_overhead

In each step the device finishes. The host commits tokens, schedules the next step, builds its batch
and dispatches it ("device idle"). While that step runs, the host emits output ("overlapped"). Both
are timed. "host without overlap" is the host's share of a step if the device waited for all of it.
As a check, the dispatches run again without an engine, with the same arrays ("alone"). Only full
decodes are counted, of eight tokens per request.
"""

import time
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

import jfp8kv
from benchmarks._common import header, median, parser, smollm2, table
from jfp8kv import SamplingParams
from jfp8kv.engine import step
from jfp8kv.engine.batch import DecodeBatch
from jfp8kv.engine.buckets import DECODE_STEPS

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p, three stop strings": {
        "temperature": 0.8,
        "top_p": 0.9,
        "stop": ["\n\nQ:", "###", "</end>"],
    },
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}


class RecordedDispatches:
    """Records the dispatches of an engine: when each was made, and with which arrays."""

    def __init__(self, llm: jfp8kv.LLM):
        self.engine = llm.engine
        self.call = self.engine.programs.call
        self.engine.programs.call = self
        self.seen: list[tuple[float, DecodeBatch | None, dict[str, Hashable]]] = []

    def __call__(self, function: Any, batch: Any, pages: Any, **static: Any) -> Any:
        out = self.call(function, batch, pages, **static)
        decode = batch if function is step.decode else None
        self.seen.append((time.perf_counter(), decode, static))
        return out

    def seconds_alone(self, batch: DecodeBatch, static: dict[str, Any]) -> float:
        """Run a dispatch again, and return its seconds. It writes what is cached already."""
        started = time.perf_counter()
        output, self.engine.pages = self.call(step.decode, batch, self.engine.pages, **static)
        jax.block_until_ready(output)
        return time.perf_counter() - started


def measure(
    llm: jfp8kv.LLM, requests: int, steps: int, fields: dict[str, Any]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return seconds per step: device idle, overlapped, the whole step, and its dispatch alone."""
    recorded = RecordedDispatches(llm)
    engine = llm.engine
    prompts = np.random.default_rng(0).integers(20, 40_000, (requests, 8)).tolist()
    sampling = SamplingParams(
        max_tokens=DECODE_STEPS * (steps + 3), ignore_eos=True, seed=0, **fields
    )
    for group in llm._requests.build(prompts, sampling, {}):
        engine.add(group.requests[0])
    idle: list[float] = []
    overlapped: list[float] = []
    finished: list[float] = []
    batches: list[tuple[DecodeBatch, dict[str, Any]]] = []
    while engine.scheduler.waiting or engine.scheduler.running:
        jax.block_until_ready([in_flight.output for in_flight in engine.results.in_flight])
        device_free = time.perf_counter()
        before = len(recorded.seen)
        engine.step()
        emitted = time.perf_counter()
        if len(recorded.seen) != before + 1:
            continue
        dispatched, batch, static = recorded.seen[-1]
        if batch is None or batch.steps != DECODE_STEPS:
            continue
        idle.append(dispatched - device_free)
        overlapped.append(emitted - dispatched)
        finished.append(device_free)
        batches.append((batch, static))
    alone = [recorded.seconds_alone(batch, static) for batch, static in batches]
    engine.programs.call = recorded.call
    return idle, overlapped, np.diff(finished).tolist(), alone


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=64)
    arguments.add_argument(
        "--steps", type=int, default=8, help="dispatches of eight tokens each that are timed"
    )
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    llm = jfp8kv.LLM(
        params,
        kv_dtype="fp8_e4m3",
        max_model_len=256,
        max_num_seqs=given.requests,
        kv_cache_memory="512MiB",
    )
    rows = []
    for name, fields in SAMPLING.items():
        measure(llm, given.requests, 1, fields)  # compiles
        times = measure(llm, given.requests, given.steps, fields)
        idle, overlapped, whole, alone = (median(seconds) for seconds in times)
        host = idle + overlapped
        rows.append(
            [
                name,
                f"{1e3 * idle / DECODE_STEPS:.2f}",
                f"{1e6 * idle / DECODE_STEPS / given.requests:.1f}",
                f"{1e3 * overlapped / DECODE_STEPS:.2f}",
                f"{1e3 * whole / DECODE_STEPS:.1f}",
                f"{1e3 * alone / DECODE_STEPS:.1f}",
                f"{host / (whole + overlapped):.1%}",
                f"{idle / whole:.1%}",
            ]
        )
    columns = [
        "sampling",
        "device idle ms/step",
        "us/token",
        "overlapped ms/step",
        "step ms",
        "alone ms",
        "host without overlap",
        "host share",
    ]
    title = f"{given.requests} requests, {DECODE_STEPS} tokens per dispatch; medians"
    table(title, columns, rows)


if __name__ == "__main__":
    main()
