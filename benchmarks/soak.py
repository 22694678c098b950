"""Two thousand requests by many callers, in a tenth of the memory they want: nothing is lost, and the process does not grow.

    python -m benchmarks.soak

Threads call `generate`, read streams to the end or leave them halfway, cancel tasks of an event loop and set deadlines that
pass. Each text must be what the request alone gives, as far as it got. The resident memory of the process is compared after the
first 200 requests and at the end. Exit status 1 if it grew by more than 5%, or if anything is missing or wrong.
"""

import argparse
import asyncio
import dataclasses
import gc
import itertools
import resource
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import jfp8kv
from benchmarks._common import console, header

MODEL = Path(__file__).parent.parent / "tests" / "references" / "llama_bf16"
CALLERS, TOGETHER = 16, 8  # threads, and the most texts that one asks for at a time
PROMPT, OUTPUT = 60, 80  # tokens at most
SETTLED, GROWTH = 200, 0.05
SIZES: dict[str, Any] = {
    "max_model_len": PROMPT + OUTPUT,
    "max_num_seqs": 16,
    "page_size": 8,
    "max_num_batched_tokens": 64,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A request, and the text it gives alone."""

    prompt: list[int]
    params: jfp8kv.SamplingParams
    text: str


@dataclasses.dataclass
class Report:
    """How the requests ended, and what the process took meanwhile."""

    asked: int
    ends: Counter
    pages: int
    pages_free: int
    preemptions: int
    settled_bytes: int
    end_bytes: int
    seconds: float

    @property
    def missing(self) -> int:
        """Requests of which nobody heard."""
        return self.asked - sum(self.ends.values())

    @property
    def growth(self) -> float:
        """Share by which resident memory grew since the first requests."""
        return self.end_bytes / self.settled_bytes - 1

    @property
    def whole(self) -> bool:
        """Whether everything is accounted for."""
        return not self.missing and not self.ends["wrong"] and self.pages_free == self.pages


def requests_of(vocab: int, count: int = 40) -> list[tuple[list[int], jfp8kv.SamplingParams]]:
    """Prompts, half of them with a beginning in common, and how to go on with each."""
    rng = np.random.default_rng(0)
    beginning = rng.integers(5, vocab, PROMPT // 2).tolist()
    made = []
    for seed in range(count):
        own = rng.integers(5, vocab, int(rng.integers(1, PROMPT // 2))).tolist()
        params = jfp8kv.SamplingParams(
            max_tokens=int(rng.integers(1, OUTPUT)), seed=seed, ignore_eos=True
        )
        made.append((beginning * (seed % 2) + own, params))
    return made


class Caller:
    """One thread's share of the requests."""

    def __init__(self, llm: jfp8kv.LLM, kinds: list[Kind], seed: int):
        self.llm, self.kinds, self.rng = llm, kinds, np.random.default_rng(seed)
        self.ends: Counter = Counter()

    def call(self, count: int) -> None:
        """Ask for `count` texts in one of the ways there are."""
        chosen = [self.kinds[i] for i in self.rng.integers(0, len(self.kinds), count)]
        way = self.rng.choice(["generate", "deadline", "stream", "astream"])
        if way in ("generate", "deadline"):
            self._generate(chosen, late=way == "deadline")
        elif way == "stream":
            self._stream(chosen)
        else:
            asyncio.run(self._astream(chosen))

    def _generate(self, chosen: list[Kind], *, late: bool) -> None:
        limit = float(self.rng.uniform(0.001, 0.2)) if late else None
        fields = [dataclasses.replace(kind.params, deadline_s=limit) for kind in chosen]
        for kind, out in zip(
            chosen,
            self.llm.generate([k.prompt for k in chosen], fields, progress=False),
            strict=True,
        ):
            self._book(kind, out.text, out.outputs[0].finish_reason)

    def _stream(self, chosen: list[Kind]) -> None:
        """Several at a time, a piece of each in turn; half of them are left after a few pieces."""
        streams = [self.llm.stream(kind.prompt, kind.params) for kind in chosen]
        most = [int(self.rng.integers(1, 9)) if self.rng.random() < 0.5 else OUTPUT for _ in chosen]
        said = list(
            itertools.zip_longest(
                *(itertools.islice(s, n) for s, n in zip(streams, most, strict=True)), fillvalue=""
            )
        )
        for kind, stream, count, pieces in zip(
            chosen, streams, most, zip(*said, strict=True), strict=True
        ):
            stream.close()
            self._book(kind, "".join(pieces), "length" if count == OUTPUT else "closed")

    async def _astream(self, chosen: list[Kind]) -> None:
        said: list[list[str]] = [[] for _ in chosen]
        tasks = [asyncio.create_task(self._read(*each)) for each in zip(chosen, said, strict=True)]
        for task in tasks:
            if self.rng.random() < 0.5:
                await asyncio.sleep(float(self.rng.uniform(0, 0.05)))
                task.cancel()
        for kind, pieces, error in zip(
            chosen, said, await asyncio.gather(*tasks, return_exceptions=True), strict=True
        ):
            if isinstance(error, Exception):
                raise error
            self._book(kind, "".join(pieces), "length" if error is None else "cancelled")

    async def _read(self, kind: Kind, said: list[str]) -> None:
        async for piece in self.llm.astream(kind.prompt, kind.params):
            said.append(piece)

    def _book(self, kind: Kind, text: str, end: str) -> None:
        whole = (
            text == kind.text if end == "length" else kind.text.startswith(text.rstrip("\ufffd"))
        )
        self.ends[end if whole else "wrong"] += 1


def soak(
    params: jfp8kv.Params,
    requests: int,
    *,
    kv_dtype: str = "fp8_e4m3",
    settled: int = SETTLED,
    share: float = 0.1,
    **sizes: Any,
) -> Report:
    """Run it. The pool has this share of the pages that the texts asked for at one time would take, on average."""
    asked, sizes = requests_of(params.config.vocab), SIZES | sizes
    probe = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory="100kB", **sizes)._engine
    text_pages = np.mean(
        [
            probe.requirements.total_pages(len(prompt) + sampling.max_tokens)
            for prompt, sampling in asked
        ]
    )
    pages = int(CALLERS * (1 + TOGETHER) / 2 * text_pages * share)
    cache = {"kv_dtype": kv_dtype, "kv_cache_memory": pages * probe.kv.page_bytes}
    alone = jfp8kv.LLM(params, prefix_caching=False, **cache, **sizes)
    known = [
        Kind(prompt, sampling, alone.generate([prompt], sampling)[0].text)
        for prompt, sampling in asked
    ]
    llm = jfp8kv.LLM(params, **cache, **sizes)
    llm.warmup()
    lock, left, at_first = threading.Lock(), [requests], [0]

    def take(rng: np.random.Generator) -> int:
        with lock:
            count = min(left[0], int(rng.integers(1, TOGETHER + 1)))
            left[0] -= count
            if not at_first[0] and requests - left[0] >= settled:
                at_first[0] = resident_bytes()
        return count

    def work(seed: int) -> Counter:
        caller = Caller(llm, known, seed)
        while count := take(caller.rng):
            caller.call(count)
        return caller.ends

    began = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        ends = sum(pool.map(work, range(CALLERS)), Counter())
    seconds = time.perf_counter() - began
    llm._driver.flush()  # cancellations take effect after the running step
    allocator = llm._engine.scheduler.kv_manager.allocator
    return Report(
        requests,
        ends,
        allocator.num_pages,
        allocator.free_pages,
        llm.stats.preemptions,
        at_first[0],
        resident_bytes(),
        seconds,
    )


def resident_bytes() -> int:
    """What the process holds in memory now; where that cannot be read, the most it ever held."""
    gc.collect()
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--requests", type=int, default=2000)
    arguments.add_argument("--kv-dtype", default="fp8_e4m3")
    given = arguments.parse_args()
    header()
    report = soak(jfp8kv.load(MODEL, dtype="float32"), given.requests, kv_dtype=given.kv_dtype)
    ends = ", ".join(f"{count} {end}" for end, count in sorted(report.ends.items()))
    console.print(
        f"{report.asked} requests in {report.seconds:.0f} s: {ends}; {report.missing} missing"
    )
    console.print(
        f"{report.preemptions} preemptions in {report.pages} pages, of which {report.pages_free} are free at the end"
    )
    first, last = (f"{size / 2**20:.1f} MiB" for size in (report.settled_bytes, report.end_bytes))
    console.print(
        f"resident memory {first} after {SETTLED} requests, {last} at the end: {report.growth:+.1%}"
    )
    return 0 if report.whole and report.growth <= GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
