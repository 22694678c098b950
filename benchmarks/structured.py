"""What it costs to hold texts to a JSON schema.

    python -m benchmarks.structured

The same prompts without and with a schema (of an array that is never done, so that all make as many tokens), and free ones
beside one that is held to it. Then the host's share: how long it takes to find out which tokens may come next, and how much of
that is over before the device has run the model, which it does meanwhile.
"""

import functools
import time

import jfp8kv
from benchmarks._common import console, header, interleaved, median, parser, smollm2, table

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "pattern": r"^[a-z]{1,12}@[a-z]{1,12}\.(com|org)$"},
        "role": {"enum": ["admin", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "email", "role", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}


class Watch:
    """Times an engine's guides, and sees whether the device was still running the model once they were done."""

    def __init__(self, llm: jfp8kv.LLM):
        engine = llm._engine
        self.seconds: list[float] = []
        self.hidden: list[bool] = []
        engine.structured_output.allowed = functools.partial(
            self._timed, engine.structured_output.allowed
        )
        engine.programs.compute = functools.partial(self._seen, engine.programs.compute)

    def _timed(self, allowed, *args, **more):
        began = time.perf_counter()
        masks = allowed(*args, **more)
        self.seconds.append(time.perf_counter() - began)
        return masks

    def _seen(self, compute, function, logits, batch, **static):
        self.hidden.append(not logits.is_ready())
        return compute(function, logits, batch, **static)


def compiled(llm: jfp8kv.LLM) -> None:
    """What the first request of a model and of a grammar pays once."""
    guides, began = llm._engine.structured_output, time.perf_counter()
    guides._known  # noqa: B018
    known, began = time.perf_counter() - began, time.perf_counter()
    guides.check(jfp8kv.SamplingParams(json_schema=SCHEMA))
    console.print(
        f"once: the vocabulary {known * 1e3:.0f} ms, the schema {(time.perf_counter() - began) * 1e3:.1f} ms"
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=8)
    arguments.add_argument("--tokens", type=int, default=64, help="made for each")
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    sizes = {"max_num_seqs": given.requests, "max_model_len": 512, "kv_cache_memory": "256MiB"}
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **sizes)
    llm.warmup(structured=True)
    compiled(llm)
    watch = Watch(llm)
    prompts = [f"A list of {i + 3} users of our site, as JSON:\n" for i in range(given.requests)]
    free = jfp8kv.SamplingParams(temperature=0.7, seed=0, max_tokens=given.tokens, ignore_eos=True)
    held = jfp8kv.SamplingParams.from_fields(free, json_schema=SCHEMA)

    cpu: dict[str, list[float]] = {}

    def side(name: str, asks: list[jfp8kv.SamplingParams]):
        def run() -> list[jfp8kv.RequestOutput]:
            began = time.process_time()
            outs = llm.generate(prompts, asks, progress=False)
            cpu.setdefault(name, []).append(time.process_time() - began)
            assert all(len(out.token_ids) == given.tokens for out in outs), (
                "they are to make as many tokens"
            )
            assert not any(
                ask is held and not out.text.lstrip().startswith("[")
                for ask, out in zip(asks, outs, strict=True)
            )
            return []

        return run

    count = given.requests
    asked = {
        "free": [free] * count,
        "one held": [held] + [free] * (count - 1),
        "all held": [held] * count,
    }
    sides = {name: side(name, asks) for name, asks in asked.items()}
    seconds = {
        name: median(times) for name, times in interleaved(sides, rounds=given.rounds).items()
    }
    steps = given.tokens
    rows = [
        [
            name,
            f"{took / steps * 1e3:.1f}",
            f"{count * steps / took:.1f}",
            f"{min(cpu[name]) / steps * 1e3:.1f}",
        ]
        for name, took in seconds.items()
    ]
    columns = ["", "ms a step", "tok/s", "CPU ms a step, least"]
    table(f"{count} requests, {steps} tokens each, prompts included", columns, rows)
    watch.seconds, watch.hidden = [], []
    sides["all held"]()
    worst, all_ = max(watch.seconds), sum(watch.seconds)
    unseen = sum(s for s, hidden in zip(watch.seconds, watch.hidden, strict=True) if hidden)
    console.print(
        f"masks of {count} held requests: {median(watch.seconds) * 1e3:.2f} ms a step (most {worst * 1e3:.1f}), "
        f"{all_ / seconds['all held']:.1%} of all time; {unseen / all_:.0%} of it hidden"
    )


if __name__ == "__main__":
    main()
