"""The cost of structured output.

    python -m benchmarks.structured

The same prompts without and with a JSON schema (of an array that is never complete, so that all
outputs have the same length), and unconstrained requests in a batch with a constrained one. Then
the share of the host: the time to compute the token bitmasks, and how much of it is hidden behind
the forward pass, which the device runs meanwhile.
"""

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


class BitmaskTimer:
    """Times the computation of bitmasks, and records whether the device was still busy after it."""

    def __init__(self, llm: jfp8kv.LLM):
        self.seconds: list[float] = []
        self.hidden: list[bool] = []
        engine = llm.engine
        token_bitmask, compute = engine.batch_builder.token_bitmask, engine.programs.compute

        def timed_bitmask(*args, **kwargs):
            started = time.perf_counter()
            bitmask = token_bitmask(*args, **kwargs)
            self.seconds.append(time.perf_counter() - started)
            return bitmask

        def recorded_compute(function, logits, batch, **static):
            self.hidden.append(not logits.is_ready())
            return compute(function, logits, batch, **static)

        engine.batch_builder.token_bitmask = timed_bitmask
        engine.programs.compute = recorded_compute

    def reset(self) -> None:
        self.seconds.clear()
        self.hidden.clear()


def print_compile_times(llm: jfp8kv.LLM) -> None:
    """Print the one-time costs of a vocabulary and of a grammar."""
    structured_output = llm.engine.structured_output
    started = time.perf_counter()
    structured_output._ll_tokenizer  # noqa: B018
    vocabulary = time.perf_counter() - started
    started = time.perf_counter()
    structured_output.check(jfp8kv.SamplingParams(json_schema=SCHEMA))
    schema = time.perf_counter() - started
    console.print(
        f"once: the vocabulary {vocabulary * 1e3:.0f} ms, the schema {schema * 1e3:.1f} ms"
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=8)
    arguments.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2())
    sizes = {"max_num_seqs": given.requests, "max_model_len": 512, "kv_cache_memory": "256MiB"}
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **sizes)
    llm.warmup(structured=True)
    print_compile_times(llm)
    timer = BitmaskTimer(llm)
    count, tokens = given.requests, given.tokens
    prompts = [f"A list of {i + 3} users of our site, as JSON:\n" for i in range(count)]
    free = jfp8kv.SamplingParams(temperature=0.7, seed=0, max_tokens=tokens, ignore_eos=True)
    constrained = jfp8kv.SamplingParams.from_fields(free, json_schema=SCHEMA)
    cpu_seconds: dict[str, list[float]] = {}

    def side(name: str, sampling: list[jfp8kv.SamplingParams]):
        def run() -> None:
            started = time.process_time()
            outs = llm.generate(prompts, sampling, progress=False)
            cpu_seconds.setdefault(name, []).append(time.process_time() - started)
            for out, params in zip(outs, sampling, strict=True):
                assert len(out.token_ids) == tokens, "all outputs have the same length"
                assert params is free or out.text.lstrip().startswith("[")

        return run

    sides = {
        name: side(name, sampling)
        for name, sampling in {
            "unconstrained": [free] * count,
            "one constrained": [constrained] + [free] * (count - 1),
            "all constrained": [constrained] * count,
        }.items()
    }
    timings = interleaved(sides, rounds=given.rounds)
    seconds = {name: median(times) for name, times in timings.items()}
    rows = [
        [
            name,
            f"{took / tokens * 1e3:.1f}",
            f"{count * tokens / took:.1f}",
            f"{min(cpu_seconds[name]) / tokens * 1e3:.1f}",
        ]
        for name, took in seconds.items()
    ]
    columns = ["", "ms per step", "tok/s", "CPU ms per step, minimum"]
    table(f"{count} requests, {tokens} tokens each, prefill included", columns, rows)
    timer.reset()
    sides["all constrained"]()
    total = sum(timer.seconds)
    share = total / seconds["all constrained"]
    hidden = sum(s for s, hidden in zip(timer.seconds, timer.hidden, strict=True) if hidden)
    console.print(
        f"bitmasks of {count} requests: {median(timer.seconds) * 1e3:.2f} ms per step "
        f"(maximum {max(timer.seconds) * 1e3:.1f}), {share:.1%} of the time, "
        f"{hidden / total:.0%} of it hidden"
    )


if __name__ == "__main__":
    main()
