"""A batch run without a model, as a program: `python stub.py CONFIG [OPTIONS]`. What it makes depends on prompt and seed alone.

It holds a window of requests and finishes them in an order of its own, as an engine does.
"""

import argparse
import hashlib
import os
import random
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from jfp8kv.batch.check import load
from jfp8kv.batch.run import RunStopped, run
from jfp8kv.batch.view import View
from jfp8kv.core.errors import ConfigError


class Stub:
    """An engine that answers with digests. `window` requests are in flight; each step takes `step_s` and ends some of them."""

    about = {"device": "none", "kv_dtype": "none"}

    def __init__(self, window: int = 64, step_s: float = 0.0, broken: str | None = None):
        self.window, self.step_s, self.broken = window, step_s, broken

    def generate(self, requests: Iterable) -> Iterator:
        order, coming, flying, more = random.Random(time.time_ns()), enumerate(requests), {}, True
        while more or flying:
            while more and len(flying) < self.window:
                number, request = next(coming, (None, None))
                if more := number is not None:
                    flying[number] = request
            if self.step_s:
                time.sleep(self.step_s)
            for number in order.sample(sorted(flying), min(len(flying), 1 + order.randrange(16))):
                yield number, self._answer(flying.pop(number))

    def score(self, requests: Iterable) -> Iterator:
        for number, request in enumerate(requests):
            words = (request.completion or request.prompt).split()
            yield (
                number,
                SimpleNamespace(
                    prompt_tokens=len(request.prompt.split()),
                    logprobs=[-float(len(w)) for w in words],
                ),
            )

    def _answer(self, request) -> object:
        prompt = str(request.prompt)
        if not prompt:
            return ConfigError("prompt 0 is empty: at least one character is needed.")
        if self.broken is not None and self.broken in prompt:
            return RuntimeError("the device is on fire")
        made = []
        for index in range(request.sampling.get("n", 1)):
            text = hashlib.blake2b(
                f"{prompt} {request.sampling['seed']} {index}".encode(), digest_size=8
            ).hexdigest()
            ids = list(text.encode())
            logprobs = (
                None
                if request.sampling.get("logprobs") is None
                else [{token: -0.5, 0: -1.5} for token in ids]
            )
            made.append(
                SimpleNamespace(
                    index=index, text=text, token_ids=ids, finish_reason="stop", logprobs=logprobs
                )
            )
        return SimpleNamespace(outputs=made, prompt_token_ids=list(range(len(prompt.split()))))

    def token_text(self, token: int) -> str:
        return chr(token)

    def counters(self) -> dict[str, float]:
        return {}


def open_stub(step_s: float, pids: Path | None, *_: object) -> Stub:
    """A stub; in `pids` a file says which process has it."""
    if pids is not None:
        (pids / str(os.getpid())).touch()
    return Stub(step_s=step_s)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--file-bytes", type=int, help="no file may grow beyond")
    parser.add_argument(
        "--pids",
        type=Path,
        help="a folder in which each engine leaves a file named after its process",
    )
    parser.add_argument("--view", action="store_true", help="show progress")
    args = parser.parse_args()
    if args.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_bytes, args.file_bytes))
    try:
        status = run(
            load(args.config),
            open_engine=partial(open_stub, args.step_s, args.pids),
            view=View(quiet=not args.view),
        ).status
    except (RunStopped, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, RunStopped) else 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return status


if __name__ == "__main__":
    sys.exit(main())
