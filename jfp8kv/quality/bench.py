"""`bench`: speed of KV caches on this device, with the same requests through each of them."""

import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.text import Text

from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.formats import kv_format
from jfp8kv.core.options import takes
from jfp8kv.core.platform import describe_platform
from jfp8kv.core.report import Report, empty_table, gap
from jfp8kv.core.types import KV_DTYPES, WeightsDtype
from jfp8kv.engine.options import KVDtype, KVScalesLike
from jfp8kv.llm import LLM
from jfp8kv.quality.keywords import BenchFields
from jfp8kv.quality.options import BenchOptions


@dataclasses.dataclass(frozen=True)
class CacheBenchmark:
    """The speed of one cache. Times and rates are medians over rounds.

    Attributes:
      kv_dtype, attention, bytes_per_token, tokens_capacity: as in `llm` and `llm.stats`.
      max_requests: the number of requests that the cache has room for at once.
      first_token_s: seconds from the call to the first token of the median request.
      prefill_tokens_s: prompt tokens per second of prefill; None for prompts of one token.
      decode_tokens_s: output tokens per second of decoding.
      output_tokens_s: output tokens per second of the whole round.
      preemptions: preemptions per round.
      compile_s: seconds of compilation, or of reading the compilation cache.
    """

    kv_dtype: str
    attention: str
    bytes_per_token: float
    tokens_capacity: int
    max_requests: int
    first_token_s: float
    prefill_tokens_s: float | None
    decode_tokens_s: float
    output_tokens_s: float
    preemptions: float
    compile_s: float


@dataclasses.dataclass(frozen=True, repr=False)
class BenchmarkReport(Report):
    """The result of `bench`. Prints as a table; `to_dict` returns everything.

    Attributes:
      requests, prompt_tokens, output_tokens, rounds: the options of the benchmark.
      device: a description of the device.
      caches: the speed of each cache; the first one is the baseline of ratios.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    device: str
    caches: tuple[CacheBenchmark, ...]

    def __repr__(self) -> str:
        rates = [f"{cache.kv_dtype} {cache.output_tokens_s:.1f} tok/s" for cache in self.caches]
        return f"BenchmarkReport({', '.join(rates)})"

    def _layout(self, lines: box.Box | None) -> Group:
        requests = f"{self.requests:,} concurrent request{'s' if self.requests > 1 else ''}"
        tokens = f"{self.prompt_tokens:,} + {self.output_tokens:,} tokens"
        rounds = "one round"
        if self.rounds > 1:
            rounds = f"medians of {self.rounds} rounds, caches interleaved"
        attention = dict.fromkeys(cache.attention for cache in self.caches)
        notes = (
            "max requests: requests that the cache has room for at once. Rates are tokens per "
            "second: prompt tokens by prefill time, output tokens by decode time, output tokens by "
            "total time.",
            f"attention by {'; '.join(attention)}",
            self.device,
        )
        return Group(
            Text(f"{requests} of {tokens}, {rounds}", style="bold"),
            *gap(lines),
            self._table(lines),
            *gap(lines),
            *map(Text, notes),
        )

    def _table(self, lines: box.Box | None) -> RenderableType:
        table = empty_table(
            lines,
            "KV cache",
            "bytes/token",
            "max requests",
            "first token",
            "prefill/s",
            "decode/s",
            "output/s",
            "",
            "preempted",
        )
        baseline = self.caches[0]
        for cache in self.caches:
            prefill = cache.prefill_tokens_s
            ratio = cache.output_tokens_s / baseline.output_tokens_s
            table.add_row(
                cache.kv_dtype,
                f"{cache.bytes_per_token:,.0f}",
                f"{cache.max_requests:,}",
                f"{cache.first_token_s:.3g} s",
                "" if prefill is None else f"{prefill:,.0f}",
                f"{cache.decode_tokens_s:,.1f}",
                f"{cache.output_tokens_s:,.1f}",
                "" if cache is baseline else f"{ratio:.2f}x",
                f"{cache.preemptions:g}",
            )
        return table


@takes(BenchOptions)
def bench(
    model: ModelLike,
    *,
    dtype: WeightsDtype | None = None,
    strict: bool = True,
    progress: bool | None = None,
    **options: Unpack[BenchFields],
) -> BenchmarkReport:
    """Measure the speed of KV caches: the same concurrent requests of random tokens through each.

    The caches are interleaved in each round, so other load on the machine affects all of them. An
    extra first round compiles and is not timed. Prefix caching is off.

        print(jfp8kv.bench(params, kv_dtypes=["bfloat16", "fp8_e4m3"], requests=32))

    Args:
      model: a path or hub id as for `load`, or a `Params`.
      dtype, strict: as for `load`, if the model is loaded here.
      progress: show a progress bar; None shows one on a terminal.
      **options: the fields of `BenchOptions`, listed below.

    Returns:
      The speed of each cache.

    Raises:
      ConfigError: an invalid option, before the model is loaded.
      Other errors are those of `LLM`.
    """
    checked = BenchOptions.from_fields(also=("model", "dtype", "strict", "progress"), **options)
    caches = list(_caches(checked))
    params = as_params(model, dtype=dtype, strict=strict)
    llms = [
        LLM(
            params,
            kv_dtype=kv_dtype,
            kv_scales=kv_scales,
            attention=checked.attention,
            prefix_caching=False,
            kv_cache_memory=checked.kv_cache_memory,
            max_num_seqs=checked.requests,
            max_model_len=checked.prompt_tokens + checked.output_tokens,
        )
        for kv_dtype, kv_scales in caches
    ]
    rounds = _run_rounds(llms, params.config.vocab, checked, progress)
    return BenchmarkReport(
        requests=checked.requests,
        prompt_tokens=checked.prompt_tokens,
        output_tokens=checked.output_tokens,
        rounds=checked.rounds,
        device=describe_platform(),
        caches=tuple(
            _medians(_label(llm, kv_scales), llm, timed, checked)
            for llm, (_, kv_scales), timed in zip(llms, caches, rounds, strict=True)
        ),
    )


def _caches(options: BenchOptions) -> Iterator[tuple[KVDtype, KVScalesLike]]:
    """Yield each format with its scales: all `kv_scales` for FP8 formats, else "auto"."""
    for kv_dtype in options.kv_dtypes:
        scales = options.kv_scales if _takes_scales(kv_dtype) else ("auto",)
        for kv_scales in scales:
            yield kv_dtype, kv_scales


def _takes_scales(kv_dtype: KVDtype) -> bool:
    """Return whether `kv_scales` applies to this format: not to unquantized ones and plans."""
    if isinstance(kv_dtype, str) and kv_dtype in KV_DTYPES and kv_dtype != "auto":
        return kv_format(kv_dtype).is_fp8
    return not isinstance(kv_dtype, KVPlan | str | os.PathLike)


def _label(llm: LLM, kv_scales: KVScalesLike) -> str:
    if isinstance(kv_scales, KVScales):
        return f"{llm.kv_dtype}, {kv_scales.granularity}"
    return llm.kv_dtype if kv_scales == "auto" else f"{llm.kv_dtype}, {kv_scales}"


@dataclasses.dataclass(frozen=True)
class _Round:
    """One run of all requests. `counters` are the differences of `llm.stats`."""

    seconds: float
    first_token_s: float
    counters: dict[str, float]


def _run_rounds(
    llms: Sequence[LLM], vocab: int, options: BenchOptions, progress: bool | None
) -> list[list[_Round]]:
    """Return the timed rounds of each cache."""
    from tqdm import tqdm

    rounds: list[list[_Round]] = [[] for _ in llms]
    total = (options.rounds + 1) * len(llms)
    with tqdm(total=total, unit="run", disable=None if progress is None else not progress) as bar:
        for number in range(options.rounds + 1):
            rng = np.random.default_rng(number)
            shape = (options.requests, options.prompt_tokens)
            prompts = rng.integers(0, vocab, shape).tolist()
            for llm, llm_rounds in zip(llms, rounds, strict=True):
                llm_rounds.append(_run(llm, prompts, options.output_tokens))
                bar.update()
    return [llm_rounds[1:] for llm_rounds in rounds]  # the first round compiles


def _run(llm: LLM, prompts: list[list[int]], output_tokens: int) -> _Round:
    before = llm.stats.to_dict()
    start = time.perf_counter()
    outputs = llm.generate(
        prompts, max_tokens=output_tokens, temperature=0.0, ignore_eos=True, progress=False
    )
    seconds = time.perf_counter() - start
    after = llm.stats.to_dict()
    first_tokens = [out.first_token_s for out in outputs if out.first_token_s is not None]
    counters = {name: after[name] - before[name] for name in after}
    return _Round(seconds, statistics.median(first_tokens), counters)


def _medians(
    label: str, llm: LLM, rounds: Sequence[_Round], options: BenchOptions
) -> CacheBenchmark:
    prompt_tokens = options.requests * (options.prompt_tokens - 1)
    output_tokens = options.requests * options.output_tokens

    def rate(tokens: int, counter: str) -> float:
        return statistics.median(tokens / max(each.counters[counter], 1e-9) for each in rounds)

    stats = llm.stats
    return CacheBenchmark(
        kv_dtype=label,
        attention=llm.attention,
        bytes_per_token=stats.kv_bytes_per_token,
        tokens_capacity=stats.kv_tokens_capacity,
        max_requests=stats.kv_tokens_capacity // (options.prompt_tokens + options.output_tokens),
        first_token_s=statistics.median(each.first_token_s for each in rounds),
        prefill_tokens_s=rate(prompt_tokens, "prefill_s") if prompt_tokens else None,
        decode_tokens_s=rate(output_tokens, "decode_s"),
        output_tokens_s=statistics.median(output_tokens / each.seconds for each in rounds),
        preemptions=statistics.median(each.counters["preemptions"] for each in rounds),
        compile_s=llm.compile_report().seconds,
    )
