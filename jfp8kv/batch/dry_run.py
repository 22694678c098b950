"""Report on a run without running it: its rows, tokens and cache. Weights are not read."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from jfp8kv.batch import outputs
from jfp8kv.batch.config import CalibrateFirst, Config, InputFile
from jfp8kv.batch.dataset_tasks import DATASET_TASKS, read_prompts
from jfp8kv.batch.engine import engine_kv_dtype
from jfp8kv.batch.openai import check_custom_ids
from jfp8kv.batch.requests import RowRequest
from jfp8kv.batch.run import validate_first_rows
from jfp8kv.batch.run_requests import request_format
from jfp8kv.batch.templates import prompt_builder
from jfp8kv.core.errors import ConfigError, Jfp8kvError
from jfp8kv.core.sizes import parse_bytes
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.rows import Fields, Row

if TYPE_CHECKING:
    from jfp8kv.models.params import Params
    from jfp8kv.sampling.structured import StructuredOutput
    from jfp8kv.text.tokenizer import Tokenizer

MAX_ERRORS_SHOWN = 3
GIB = 2**30
BuildRequest: TypeAlias = Callable[[Row, Fields], RowRequest]


@dataclass
class RowCounts:
    """Counts over the rows of a run.

    Attributes:
      rows: all rows of the shard.
      failed: rows that would fail.
      errors: the first of their errors.
      sequences: sequences that run: one for each row and output.
      prompt_tokens: total of all prompts.
      completion_tokens: upper bound of all outputs.
      longest_prompt: tokens of the longest prompt.
    """

    rows: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest_prompt: int = 0

    @property
    def mean_length(self) -> float:
        """The average number of tokens of a sequence."""
        return (self.prompt_tokens + self.completion_tokens) / max(1, self.sequences)


@dataclass(frozen=True)
class DryRun:
    """A report on a run. Prints as a table.

    Attributes:
      counts: rows and tokens.
      concurrent_sequences: how many sequences of mean length run at once in the cache.
      max_num_seqs: the limit of the engine on their number.
    """

    counts: RowCounts
    model: str
    parameters: int
    weights_bytes: int
    max_model_len: int
    kv_dtype: str
    kv_bytes_per_token: float
    kv_cache_bytes: int
    concurrent_sequences: int
    max_num_seqs: int
    device: str

    @property
    def status(self) -> int:
        """The exit status: 1 if a row would fail."""
        return 1 if self.counts.failed else 0

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"model    {self.model}, {self.parameters / 1e6:,.0f}M parameters, "
            f"{self.weights_bytes / GIB:,.2f} GiB of weights",
            f"device   {self.device}",
            f"rows     {counts.rows:,} ({counts.failed:,} would fail)",
            f"tokens   {counts.prompt_tokens:,} of prompts (longest {counts.longest_prompt:,} of "
            f"{self.max_model_len:,}), at most {counts.completion_tokens:,} of outputs",
            f"cache    {self.kv_dtype}, {self.kv_bytes_per_token:,.0f} bytes per token, "
            f"{self.kv_cache_bytes / GIB:,.2f} GiB: {self.concurrent_sequences:,} sequences of "
            f"mean length at once (limit {self.max_num_seqs:,})",
        ]
        return "\n".join([*lines, *(f"error    {error}" for error in counts.errors)])


def dry_run(config: Config) -> DryRun:
    """Read every row of a run, tokenize it, and report what the run needs.

    Raises `ConfigError` or `CheckpointError` for a mistake that prevents the run from starting.
    """
    import jax

    from jfp8kv.cache.capacity import default_bytes
    from jfp8kv.checkpoint.load import read_checkpoint_info
    from jfp8kv.engine.buckets import Buckets
    from jfp8kv.quality.model_report import inspect

    params = read_checkpoint_info(config.model, weights=False).abstract_params()
    engine = config.engine.options()
    model = inspect(
        params,
        kv_dtype=engine_kv_dtype(config),
        kv_scales="unit" if isinstance(config.kv_scales, CalibrateFirst) else config.kv_scales,
        max_model_len=engine.max_model_len,
        page_size=engine.page_size,
    )
    cache = next(cost for cost in model.caches if cost.requested)
    buckets = Buckets.of(engine.max_num_seqs, engine.max_num_batched_tokens)
    if config.task not in DATASET_TASKS:
        outputs.output_schema(config)  # rows that cannot be written raise
    counts = _count_rows(config, params, model.max_model_len)
    for file in _calibration_files(config):
        for _ in read_prompts(config, file):
            pass  # an invalid row raises

    device = jax.devices()[0]
    if engine.kv_cache_memory is not None:
        memory = parse_bytes(engine.kv_cache_memory)
    else:
        weights = 0 if device.platform == "cpu" else model.weights.bytes_in_memory
        memory = max(0, default_bytes(device) - weights)
    pages = -(-counts.mean_length // engine.page_size)
    sequence_bytes = max(1, pages * engine.page_size * cache.bytes_per_token)
    return DryRun(
        counts=counts,
        model=config.model,
        parameters=model.weights.parameters,
        weights_bytes=model.weights.bytes_in_memory,
        max_model_len=model.max_model_len,
        kv_dtype=cache.kv_dtype,
        kv_bytes_per_token=cache.bytes_per_token,
        kv_cache_bytes=memory,
        concurrent_sequences=min(int(memory // sequence_bytes), buckets.max_requests),
        max_num_seqs=buckets.max_requests,
        device=f"{device.platform}: {device.device_kind}",
    )


def _calibration_files(config: Config) -> Iterator[InputFile]:
    """Yield the files with prompts to calibrate on."""
    if isinstance(config.kv_scales, CalibrateFirst):
        yield config.kv_scales.calibrate.input
    if config.task == "compare" and config.comparison.calibration is not None:
        yield config.comparison.calibration


def _count_rows(config: Config, model: "Params", max_model_len: int) -> RowCounts:
    """Count every row of the shard. Raises `ConfigError` if none of the first rows is valid."""
    from jfp8kv.sampling.structured import StructuredOutput

    structured = StructuredOutput(model.tokenizer, model.config.vocab, eos_ids=model.eos_ids)
    reader = config.input.reader()
    build = _request_builder(config)
    if reader.format == "openai":
        check_custom_ids(reader)
    else:
        validate_first_rows(config.input, build)
    counts = RowCounts()
    index, count = config.shard or (0, 1)
    with closing(iter(reader)) as rows:
        for row in rows:
            if row.number % count != index:
                continue
            counts.rows += 1
            try:
                request = build(row, row.fields())
                sampling = None
                if config.task == "generate":
                    sampling = _check_sampling(request, model.config.vocab, structured)
                _count(counts, request, sampling, model.tokenizer, max_model_len)
            except Jfp8kvError as error:
                counts.failed += 1
                if len(counts.errors) < MAX_ERRORS_SHOWN:
                    counts.errors.append(f"{config.input.path}:{row.line}: {error}")
    return counts


def _request_builder(config: Config) -> BuildRequest:
    """Return the function that builds the request of a row."""
    if config.task in DATASET_TASKS:
        build = prompt_builder(config)
        return lambda _, fields: RowRequest(build(fields))
    return request_format(config, str, 0).request


def _check_sampling(
    request: RowRequest, vocab: int, structured: "StructuredOutput"
) -> SamplingParams:
    """Return the sampling options of a request. Raises `ConfigError` if the engine refuses them."""
    sampling = SamplingParams.from_fields(**request.sampling)
    sampling.check_vocab(vocab)
    structured.check(sampling)
    return sampling


def _count(
    counts: RowCounts,
    request: RowRequest,
    sampling: SamplingParams | None,
    tokenizer: "Tokenizer | None",
    max_model_len: int,
) -> None:
    """Count a row; without `sampling` it has no output. Raises `ConfigError` if it is too long."""
    from jfp8kv.text.prompts import encode_pair

    prompt_tokens = len(encode_pair(request.prompt, request.completion, tokenizer).ids)
    output_tokens = 0 if sampling is None else 1
    if not 0 < prompt_tokens <= max_model_len - output_tokens:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens; max_model_len is {max_model_len}."
        )
    sequences = 1
    if sampling is not None:
        sequences = sampling.best_of or sampling.n
        output_tokens = min(sampling.max_tokens, max_model_len - prompt_tokens)
    counts.sequences += sequences
    counts.prompt_tokens += prompt_tokens
    counts.completion_tokens += output_tokens * sequences
    counts.longest_prompt = max(counts.longest_prompt, prompt_tokens)
