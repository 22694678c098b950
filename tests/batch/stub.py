"""A batch run without a model, as a program: `python stub.py CONFIG [OPTIONS]`.

The stub engine has a window of requests in flight and finishes them in random order, as an engine
does. An output depends only on the prompt and the seed.
"""

import argparse
import hashlib
import itertools
import os
import random
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from jfp8kv.batch import ProgressDisplay, RunStopped, run_batch
from jfp8kv.core.errors import ConfigError, StepError


class StubEngine:
    """An engine whose outputs are digests.

    Args:
      window: number of requests in flight.
      step_s: duration of a step, which finishes some of them.
      broken: requests with this text in the prompt fail in the engine.
    """

    description = {"device": "none", "kv_dtype": "none"}

    def __init__(self, window: int = 64, step_s: float = 0.0, broken: str | None = None):
        self.window = window
        self.step_s = step_s
        self.broken = broken

    def generate(self, requests: Iterable) -> Iterator:
        order = random.Random(time.time_ns())
        waiting = enumerate(requests)
        in_flight = dict(itertools.islice(waiting, self.window))
        while in_flight:
            if self.step_s:
                time.sleep(self.step_s)
            count = min(len(in_flight), 1 + order.randrange(16))
            for number in order.sample(sorted(in_flight), count):
                yield number, self._answer(in_flight.pop(number))
            in_flight.update(itertools.islice(waiting, self.window - len(in_flight)))

    def score(self, requests: Iterable) -> Iterator:
        for number, request in enumerate(requests):
            words = (request.completion or request.prompt).split()
            prompt_tokens = len(request.prompt.split())
            logprobs = [-float(len(word)) for word in words]
            yield number, SimpleNamespace(prompt_tokens=prompt_tokens, logprobs=logprobs)

    def _answer(self, request) -> object:
        prompt = str(request.prompt)
        if not prompt:
            return ConfigError("prompt 0 is empty: at least one character is needed.")
        if self.broken is not None and self.broken in prompt:
            return StepError("the device is on fire")
        outputs = [
            self._completion(index, f"{prompt} {request.sampling['seed']} {index}", request)
            for index in range(request.sampling.get("n", 1))
        ]
        return SimpleNamespace(outputs=outputs, prompt_token_ids=list(range(len(prompt.split()))))

    def _completion(self, index: int, key: str, request) -> SimpleNamespace:
        text = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        token_ids = list(text.encode())
        logprobs = None
        if request.sampling.get("logprobs") is not None:
            logprobs = [{token: -0.5, 0: -1.5} for token in token_ids]
        return SimpleNamespace(
            index=index, text=text, token_ids=token_ids, finish_reason="stop", logprobs=logprobs
        )

    def token_text(self, token: int) -> str:
        return chr(token)

    def counters(self) -> dict[str, float]:
        return {}


def open_stub(step_s: float, pids: Path | None, *_: object) -> StubEngine:
    """Open a stub engine; in the folder `pids` a file is named after its process."""
    if pids is not None:
        (pids / str(os.getpid())).touch()
    return StubEngine(step_s=step_s)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--file-bytes", type=int, help="maximum size of a file")
    parser.add_argument("--pids", type=Path, help="folder for a file per engine process")
    parser.add_argument("--progress", action="store_true", help="show progress")
    args = parser.parse_args()
    if args.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_bytes, args.file_bytes))
    try:
        result = run_batch(
            args.config,
            display=ProgressDisplay(quiet=not args.progress),
            open_engine=partial(open_stub, args.step_s, args.pids),
        )
    except RunStopped as error:
        print(error, file=sys.stderr)
        return 1
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return result.status


if __name__ == "__main__":
    sys.exit(main())
