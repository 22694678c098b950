"""Two thousand requests by many callers, in a tenth of the memory they need at once.

    python -m benchmarks.soak

Threads call `generate`, read streams to the end or close them halfway, cancel tasks of an event
loop and set deadlines that pass. Each output must be that of the request alone, or its prefix.
The resident memory of the process is compared after the first 200 requests and at the end. Exit
status 1 if it grew by more than 5%, or if a request is lost or wrong.
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
CALLERS = 16  # threads
MAX_PROMPTS = 8  # of one call
PROMPT = 60  # tokens, at most
OUTPUT = 80  # tokens, at most
TEMPLATES = 40
WARM_UP = 200  # requests after which memory is measured first
MAX_GROWTH = 0.05
SIZES: dict[str, Any] = {
    "max_model_len": PROMPT + OUTPUT,
    "max_num_seqs": 16,
    "page_size": 8,
    "max_num_batched_tokens": 64,
}


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt, its sampling parameters, and its output when it runs alone."""

    prompt: list[int]
    params: jfp8kv.SamplingParams
    text: str


@dataclasses.dataclass
class Report:
    """How the requests ended, and the memory of the process.

    Attributes:
      requests: how many were submitted.
      ends: requests by how they ended.
      pages: pages of the pool.
      free_pages: those that are free at the end.
      preemptions: of all requests.
      warm_bytes: resident memory after the first requests.
      end_bytes: resident memory at the end.
      seconds: for all requests.
    """

    requests: int
    ends: Counter[str]
    pages: int
    free_pages: int
    preemptions: int
    warm_bytes: int
    end_bytes: int
    seconds: float

    @property
    def missing(self) -> int:
        """Requests without a result."""
        return self.requests - sum(self.ends.values())

    @property
    def growth(self) -> float:
        """Relative growth of resident memory since the first requests."""
        return self.end_bytes / self.warm_bytes - 1

    @property
    def complete(self) -> bool:
        """Whether all requests have a correct result and all pages are free."""
        return not self.missing and not self.ends["wrong"] and self.free_pages == self.pages


def random_requests(vocab: int) -> list[tuple[list[int], jfp8kv.SamplingParams]]:
    """Return prompts, half of them with a common prefix, and sampling parameters."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, vocab, PROMPT // 2).tolist()
    requests = []
    for seed in range(TEMPLATES):
        suffix = rng.integers(5, vocab, int(rng.integers(1, PROMPT // 2))).tolist()
        params = jfp8kv.SamplingParams(
            max_tokens=int(rng.integers(1, OUTPUT)), seed=seed, ignore_eos=True
        )
        requests.append((prefix * (seed % 2) + suffix, params))
    return requests


class Caller:
    """The calls of one thread, and how their requests ended."""

    def __init__(self, llm: jfp8kv.LLM, templates: list[Template], seed: int):
        self.llm = llm
        self.templates = templates
        self.rng = np.random.default_rng(seed)
        self.ends: Counter[str] = Counter()

    def call(self, count: int) -> None:
        """Submit `count` requests by a random method."""
        chosen = [self.templates[i] for i in self.rng.integers(0, len(self.templates), count)]
        method = self.rng.choice(["generate", "deadline", "stream", "astream"])
        if method == "generate":
            self._generate(chosen, deadline_s=None)
        elif method == "deadline":
            self._generate(chosen, deadline_s=float(self.rng.uniform(0.001, 0.2)))
        elif method == "stream":
            self._stream(chosen)
        else:
            asyncio.run(self._astream(chosen))

    def _generate(self, chosen: list[Template], *, deadline_s: float | None) -> None:
        params = [
            dataclasses.replace(template.params, deadline_s=deadline_s) for template in chosen
        ]
        prompts = [template.prompt for template in chosen]
        outs = self.llm.generate(prompts, params, progress=False)
        for template, out in zip(chosen, outs, strict=True):
            self._record(template, out.text, str(out.outputs[0].finish_reason))

    def _stream(self, chosen: list[Template]) -> None:
        """Read several streams, interleaved. Half of them are closed after a few pieces."""
        streams = [self.llm.stream(template.prompt, template.params) for template in chosen]
        limits = [
            int(self.rng.integers(1, 9)) if self.rng.random() < 0.5 else OUTPUT for _ in chosen
        ]
        limited = [
            itertools.islice(stream, limit) for stream, limit in zip(streams, limits, strict=True)
        ]
        rounds = list(itertools.zip_longest(*limited, fillvalue=""))
        texts = ["".join(pieces) for pieces in zip(*rounds, strict=True)]
        for template, stream, limit, text in zip(chosen, streams, limits, texts, strict=True):
            stream.close()
            self._record(template, text, "length" if limit == OUTPUT else "closed")

    async def _astream(self, chosen: list[Template]) -> None:
        """Read streams in tasks of an event loop. Half of the tasks are cancelled."""
        outputs: list[list[str]] = [[] for _ in chosen]
        tasks = [
            asyncio.create_task(self._read(template, pieces))
            for template, pieces in zip(chosen, outputs, strict=True)
        ]
        for task in tasks:
            if self.rng.random() < 0.5:
                await asyncio.sleep(float(self.rng.uniform(0, 0.05)))
                task.cancel()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        for template, pieces, error in zip(chosen, outputs, errors, strict=True):
            if isinstance(error, Exception):
                raise error
            self._record(template, "".join(pieces), "length" if error is None else "cancelled")

    async def _read(self, template: Template, pieces: list[str]) -> None:
        async for piece in self.llm.astream(template.prompt, template.params):
            pieces.append(piece)

    def _record(self, template: Template, text: str, end: str) -> None:
        """Count a request, as wrong if its text is not that of the request alone."""
        if end == "length":
            correct = text == template.text
        else:
            correct = template.text.startswith(text.rstrip("\ufffd"))
        self.ends[end if correct else "wrong"] += 1


class RequestQuota:
    """Hands out requests to threads, and measures memory once the first of them are done."""

    def __init__(self, requests: int, warm_up: int):
        self.warm_bytes = 0
        self._requests = requests
        self._warm_up = warm_up
        self._left = requests
        self._lock = threading.Lock()

    def take(self, rng: np.random.Generator) -> int:
        """Return the number of requests of the next call, 0 when there are none left."""
        with self._lock:
            count = min(self._left, int(rng.integers(1, MAX_PROMPTS + 1)))
            self._left -= count
            if not self.warm_bytes and self._requests - self._left >= self._warm_up:
                self.warm_bytes = resident_bytes()
        return count


def soak(
    params: jfp8kv.Params,
    requests: int,
    *,
    kv_dtype: str = "fp8_e4m3",
    warm_up: int = WARM_UP,
    share: float = 0.1,
    **sizes: Any,
) -> Report:
    """Run `requests` requests, and return how they ended.

    Args:
      params: the model.
      requests: the number of requests.
      kv_dtype: format of the KV cache.
      warm_up: requests after which memory is measured first.
      share: size of the pool, relative to the pages that all callers' requests need on average.
      **sizes: options of the engine in place of `SIZES`.
    """
    sizes = SIZES | sizes
    pairs = random_requests(params.config.vocab)
    probe = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory="100kB", **sizes).engine
    needed = np.mean(
        [
            probe.requirements.total_pages(len(prompt) + sampling.max_tokens)
            for prompt, sampling in pairs
        ]
    )
    pages = int(CALLERS * (1 + MAX_PROMPTS) / 2 * needed * share)
    memory = pages * probe.cache_config.page_bytes
    alone = jfp8kv.LLM(
        params, kv_dtype=kv_dtype, kv_cache_memory=memory, prefix_caching=False, **sizes
    )
    templates = [
        Template(prompt, sampling, alone.generate([prompt], sampling)[0].text)
        for prompt, sampling in pairs
    ]
    llm = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory=memory, **sizes)
    llm.warmup()
    quota = RequestQuota(requests, warm_up)

    def run_caller(seed: int) -> Counter[str]:
        caller = Caller(llm, templates, seed)
        while count := quota.take(caller.rng):
            caller.call(count)
        return caller.ends

    started = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        ends: Counter[str] = sum(pool.map(run_caller, range(CALLERS)), Counter())
    seconds = time.perf_counter() - started
    llm._driver.flush()  # cancellations take effect after the running step
    allocator = llm.engine.scheduler.kv_manager.allocator
    return Report(
        requests=requests,
        ends=ends,
        pages=allocator.num_pages,
        free_pages=allocator.free_pages,
        preemptions=llm.stats.preemptions,
        warm_bytes=quota.warm_bytes,
        end_bytes=resident_bytes(),
        seconds=seconds,
    )


def resident_bytes() -> int:
    """Return the resident memory of the process, or its peak where only that is known."""
    gc.collect()
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        f"{report.requests} requests in {report.seconds:.0f} s: {ends}; {report.missing} missing"
    )
    console.print(
        f"{report.preemptions} preemptions; {report.free_pages} of {report.pages} pages are free "
        "at the end"
    )
    console.print(
        f"resident memory {report.warm_bytes / 2**20:.1f} MiB after {WARM_UP} requests, "
        f"{report.end_bytes / 2**20:.1f} MiB at the end: {report.growth:+.1%}"
    )
    return 0 if report.complete and report.growth <= MAX_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
