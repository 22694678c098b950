"""What a run would be, without making it: every row looked at, its tokens counted, the cache they need, roughly how long.

Config and headers of the model are read, no weights. The time is a rough one: products of the shapes that the run would have
are timed on this device, and multiplied by how many there would be. Compiling and loading are not in it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from jfp8kv.batch.config import CalibrateFirst, Config, File
from jfp8kv.batch.engine import kv_dtype
from jfp8kv.batch.inputs import Reader, Row
from jfp8kv.batch.openai import OpenAI
from jfp8kv.batch.plain import Plain, Request
from jfp8kv.batch.run import peek
from jfp8kv.batch.templates import prompter
from jfp8kv.batch.whole import TASKS, prompts
from jfp8kv.core.errors import ConfigError, Jfp8kvError

SHOWN = 3  # errors of rows
PROBE = (4096, 1024)  # outputs and inputs of the product that is timed
PROBE_S = 0.2


@dataclasses.dataclass
class Counts:
    """Of the rows: how many there are, how many would fail and why the first of them, and tokens, at the most."""

    rows: int = 0
    failed: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    texts: int = 0  # continuations
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest_prompt: int = 0


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What was found. `texts_at_once` is how many of mean length the cache holds, no more than may run."""

    counts: Counts
    model: str
    parameters: int
    weights_bytes: int
    max_model_len: int
    kv_dtype: str
    kv_bytes_per_token: float
    kv_cache_bytes: int
    texts_at_once: int
    most_at_once: int
    device: str
    seconds: float

    @property
    def status(self) -> int:
        """The exit status: 1 when rows would fail."""
        return 1 if self.counts.failed else 0

    def __str__(self) -> str:
        counts, gib = self.counts, 2**30
        lines = [
            f"model    {self.model}, {self.parameters / 1e6:,.0f}M parameters, {self.weights_bytes / gib:,.2f} GiB of weights",
            f"rows     {counts.rows:,}, {counts.failed:,} of them would fail",
            f"tokens   {counts.prompt_tokens:,} in (longest prompt {counts.longest_prompt:,} of {self.max_model_len:,}), "
            f"{counts.completion_tokens:,} out at the most",
            f"cache    {self.kv_dtype}, {self.kv_bytes_per_token:,.0f} bytes per token, {self.kv_cache_bytes / gib:,.2f} GiB: "
            f"{self.texts_at_once:,} texts of mean length at once, of {self.most_at_once:,} that may run",
            f"time     roughly {_words(self.seconds)} on this device ({self.device})",
        ]
        return "\n".join([*lines, *(f"row      {error}" for error in counts.errors)])


def dry_run(config: Config) -> DryRun:
    """Look at everything a run would meet. Raises `ConfigError` or `CheckpointError` for what would keep it from starting."""
    import jax

    from jfp8kv.checkpoint.load import read_checkpoint_info
    from jfp8kv.functional import Buckets, default_bytes, parse_bytes
    from jfp8kv.quality.model_report import inspect

    shapes = read_checkpoint_info(config.model, weights=False).abstract_params()
    scales = "unit" if isinstance(config.kv_scales, CalibrateFirst) else config.kv_scales
    limits = {"max_model_len": config.engine.max_model_len, "page_size": config.engine.page_size}
    found = inspect(shapes, kv_dtype=kv_dtype(config), kv_scales=scales, **limits)
    cache = next(cost for cost in found.caches if cost.requested)
    buckets = Buckets.of(config.engine.max_num_seqs, config.engine.max_num_batched_tokens)
    counts = _counted(config, shapes, found.max_model_len)
    for file in _others(config):
        for _ in prompts(config, file):
            pass  # a row without a prompt raises

    device = jax.devices()[0]
    room = default_bytes(device) - (
        0 if device.platform == "cpu" else found.weights.bytes_in_memory
    )
    budget = (
        room
        if config.engine.kv_cache_memory is None
        else parse_bytes(config.engine.kv_cache_memory)
    )
    page, most = config.engine.page_size, buckets.max_requests
    mean = (counts.prompt_tokens + counts.completion_tokens) / max(1, counts.texts)
    fit = int(max(0, budget) // max(1, cache.bytes_per_token * page * -(-mean // page)))
    at_once = max(1, min(fit, most, counts.texts))
    return DryRun(
        counts=counts,
        model=config.model,
        parameters=found.weights.parameters,
        weights_bytes=found.weights.bytes_in_memory,
        max_model_len=found.max_model_len,
        kv_dtype=cache.kv_dtype,
        kv_bytes_per_token=cache.bytes_per_token,
        kv_cache_bytes=max(0, budget),
        texts_at_once=min(fit, most),
        most_at_once=most,
        device=f"{device.platform}: {device.device_kind}",
        seconds=_seconds(found.weights, counts, at_once, buckets.max_prefill_chunk),
    )


def _others(config: Config) -> Iterator[File]:
    """What a run reads beside the input: rows to calibrate on."""
    if isinstance(config.kv_scales, CalibrateFirst):
        yield config.kv_scales.calibrate.input
    if config.task == "compare" and config.comparison.calibration is not None:
        yield config.comparison.calibration


def _counted(config: Config, model: Any, most: int) -> Counts:
    """Every row of the shard, as the run would ask it. Raises `ConfigError` where none of the first would do."""
    from jfp8kv.functional import Guides

    reader, counts = Reader(config.input), Counts()
    guides = Guides(model.tokenizer, model.config.vocab, eos_ids=model.eos_ids)
    ask = _asking(config, reader.format)
    if reader.format != "openai":
        peek(config.input, ask)
    first, step = config.shard or (0, 1)
    with closing(iter(reader)) as rows:
        for row in rows:
            if row.number % step != first:
                continue
            counts.rows += 1
            try:
                request = ask(row, row.fields())
                sampling = (
                    _sampling(request, model.config.vocab, guides)
                    if config.task == "generate"
                    else None
                )
                _count(counts, request, sampling, model.tokenizer, most)
            except Jfp8kvError as error:
                counts.failed += 1
                if len(counts.errors) < SHOWN:
                    counts.errors.append(f"{config.input.path}:{row.line}: {error}")
    return counts


def _asking(config: Config, form: str) -> Callable[[Row, dict[str, Any]], Request]:
    """What makes a request of a row and its fields."""
    if config.task in TASKS:
        make = prompter(config)
        return lambda row, fields: Request(make(fields))
    return (OpenAI(config, str, 0) if form == "openai" else Plain(config, str)).request


def _sampling(request: Request, vocab: int, guides: Any) -> Any:
    """The `SamplingParams` of a request. Raises `ConfigError` for what the engine would not take."""
    from jfp8kv.functional import SamplingParams

    sampling = SamplingParams.from_fields(**request.sampling)
    sampling.check_vocab(vocab)
    guides.check(sampling)
    return sampling


def _count(counts: Counts, request: Request, sampling: Any, tokenizer: Any, most: int) -> None:
    """Add a row; nothing is made of it without `sampling`. Raises `ConfigError` for one that the engine would refuse."""
    from jfp8kv.functional import encode_pair

    prompt = len(encode_pair(request.prompt, request.completion, tokenizer).ids)
    if not 0 < prompt <= most - (sampling is not None):
        raise ConfigError(f"the prompt has {prompt} tokens, and max_model_len is {most}.")
    texts = 1 if sampling is None else sampling.best_of or sampling.n
    made = 0 if sampling is None else min(sampling.max_tokens, most - prompt) * texts
    counts.texts += texts
    counts.prompt_tokens += prompt
    counts.completion_tokens += made
    counts.longest_prompt = max(counts.longest_prompt, prompt)


def _seconds(weights: Any, counts: Counts, at_once: int, chunk: int) -> float:
    """Products of all weights: with chunks of the prompts, and with a token of each text that runs at once."""
    prefills, decodes = -(-counts.prompt_tokens // chunk), -(-counts.completion_tokens // at_once)
    each = [(prefills, chunk), (decodes, at_once)]
    return sum(
        times * weights.parameters * _seconds_per_weight(rows, weights.dtype)
        for times, rows in each
        if times
    )


def _seconds_per_weight(rows: int, dtype: str) -> float:
    """Of a product with `rows` rows on this device."""
    import jax
    import jax.numpy as jnp

    out, width = PROBE
    weights, x = jnp.ones((out, width), dtype), jnp.ones((max(2, rows), width), dtype)
    product = jax.jit(
        lambda x, w: jax.lax.dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
    )
    jax.block_until_ready(product(x, weights))
    calls, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < PROBE_S:
        jax.block_until_ready(product(x, weights))
        calls += 1
    return spent / calls / (out * width)


def _words(seconds: float) -> str:
    """Two figures are one too many for a rough time."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, seconds):.0f} seconds"
