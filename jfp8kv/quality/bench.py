"""How fast caches are on the device at hand: the same requests through each of them, in turn, and what each has room for."""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.text import Text
from tqdm import tqdm

from jfp8kv.cache.config import is_format_name
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.load import load
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import kv_format
from jfp8kv.core.platform import describe
from jfp8kv.core.report import Report, empty_table
from jfp8kv.llm import LLM
from jfp8kv.models.params import Params

USUAL_DTYPES = ("bfloat16", "fp8_e4m3")


@dataclasses.dataclass(frozen=True)
class CacheBenchmark:
    """One cache; times and rates are medians over rounds.

    `kv_dtype`, `attention`, `bytes_per_token`, `tokens_capacity`: as `llm.kv_dtype`, `llm.attention` and `llm.stats` have them.
    `fit` is how many of the requests it holds at once, whole. `first_token_s` are seconds from the call to the median request's
    first token; `prefill_tokens_s` prompt tokens by the seconds of their prefill (None for prompts of one token, which have
    none), `decode_tokens_s` output tokens by the seconds of decoding, `output_tokens_s` by all of them. `preemptions` are those
    of a round, `compile_s` what its programs took to compile, or to be read from the compilation cache.
    """

    kv_dtype: str
    attention: str
    bytes_per_token: float
    tokens_capacity: int
    fit: int
    first_token_s: float
    prefill_tokens_s: float | None
    decode_tokens_s: float
    output_tokens_s: float
    preemptions: float
    compile_s: float


@dataclasses.dataclass(frozen=True, repr=False)
class BenchmarkReport(Report):
    """Caches side by side, in the order asked for. Prints as a table; `to_dict` has everything."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    device: str
    caches: tuple[CacheBenchmark, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, of types that JSON has."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        return f"BenchmarkReport({', '.join(f'{c.kv_dtype} {c.output_tokens_s:.1f} tok/s' for c in self.caches)})"

    def _layout(self, lines: box.Box | None) -> Group:
        gap = [] if lines else [""]  # lines come with empty rows around them
        requests = f"{self.requests:,} request{'s' if self.requests > 1 else ''} at once"
        rounds = (
            f"medians of {self.rounds} rounds, caches in turn" if self.rounds > 1 else "one round"
        )
        title = Text(
            f"{requests} of {self.prompt_tokens:,} + {self.output_tokens:,} tokens, {rounds}",
            style="bold",
        )
        columns = (
            "KV cache",
            "bytes/token",
            "fit",
            "first token",
            "prefill/s",
            "decode/s",
            "output/s",
            "",
            "preempted",
        )
        table = empty_table(lines, *columns)
        for cache in self.caches:
            ratio = cache.output_tokens_s / self.caches[0].output_tokens_s
            table.add_row(
                cache.kv_dtype,
                f"{cache.bytes_per_token:,.0f}",
                f"{cache.fit:,}",
                f"{cache.first_token_s:.3g} s",
                "" if cache.prefill_tokens_s is None else f"{cache.prefill_tokens_s:,.0f}",
                f"{cache.decode_tokens_s:,.1f}",
                f"{cache.output_tokens_s:,.1f}",
                "" if cache is self.caches[0] else f"{ratio:.2f}x",
                f"{cache.preemptions:g}",
            )
        attention = dict.fromkeys(cache.attention for cache in self.caches)
        notes = (
            "fit: requests that the cache holds at once. Rates are tokens a second: of prompts by the time of their prefill, "
            "of outputs by the time of decoding, of outputs by all of it.",
            f"attention by {'; '.join(attention)}",
            self.device,
        )
        return Group(title, *gap, table, *gap, *map(Text, notes))


def bench(
    model: str | os.PathLike[str] | Params,
    *,
    kv_dtypes: Sequence[Any] = USUAL_DTYPES,
    kv_scales: Sequence[Any] = ("auto",),
    requests: int = 8,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rounds: int = 3,
    kv_cache_memory: int | str | None = None,
    attention: str | None = None,
    dtype: Any = None,
    strict: bool = True,
    progress: bool | None = None,
) -> BenchmarkReport:
    """Run the same requests, of random tokens and all at once, through each cache.

    Caches take turns in each round, so that what else the machine does meets all of them; a round before the first compiles and
    does not count. Nothing is reused from a prompt before.

    Args:
      model: what `load` takes, or a `Params`.
      kv_dtypes: caches to measure, each as `kv_dtype` of `LLM`.
      kv_scales: of the FP8 ones, each as for `LLM`.
      requests: how many.
      prompt_tokens: of each.
      output_tokens: of each.
      rounds: timed ones.
      kv_cache_memory: bytes of each cache. None: as much as it needs for all requests. With less, what does not fit waits or is
        preempted, and a smaller format shows what it is worth.
      attention: as for `LLM`.
      dtype: of the weights when `model` is loaded here; None keeps the checkpoint's.
      strict: whether KV scales that are missing or broken are an error when `model` is loaded here; see `load`.
      progress: show a bar; None shows one on a terminal.

    Raises `ConfigError` for what cannot be run, before the model is loaded where that can be told, and what `LLM` raises.
    """
    given = {
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": rounds,
    }
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: must be an integer of at least 1.")
    choices = _choices(kv_dtypes, kv_scales)
    params = model if isinstance(model, Params) else load(model, dtype=dtype, strict=strict)
    sizes = {
        "kv_cache_memory": kv_cache_memory,
        "max_num_seqs": requests,
        "max_model_len": prompt_tokens + output_tokens,
    }
    sides = [
        LLM(
            params,
            kv_dtype=of,
            kv_scales=scales,
            attention=attention,
            prefix_caching=False,
            **sizes,
        )
        for of, scales in choices
    ]
    measured: list[list[_Round]] = [[] for _ in sides]
    with tqdm(
        total=(rounds + 1) * len(sides),
        unit="run",
        disable=None if progress is None else not progress,
    ) as bar:
        for turn in range(rounds + 1):
            prompts = (
                np.random.default_rng(turn)
                .integers(0, params.config.vocab, (requests, prompt_tokens))
                .tolist()
            )
            for llm, found in zip(sides, measured, strict=True):
                found.append(_run(llm, prompts, output_tokens))
                bar.update()
    labels = [_label(llm, scales) for llm, (_, scales) in zip(sides, choices, strict=True)]
    caches = [_medians(*each, **given) for each in zip(labels, sides, measured, strict=True)]
    return BenchmarkReport(**given, device=describe(), caches=tuple(caches))


def _choices(kv_dtypes: Sequence[Any], kv_scales: Sequence[Any]) -> list[tuple[Any, Any]]:
    """What `LLM` is asked for, cache by cache: FP8 ones with all of `kv_scales` in turn. Raises `ConfigError`."""
    for name, given, usual in (
        ("kv_dtypes", kv_dtypes, USUAL_DTYPES),
        ("kv_scales", kv_scales, ("auto", "token_head")),
    ):
        if not isinstance(given, list | tuple) or not given:
            raise ConfigError(f"{name}={given!r}: must be a list, such as {list(usual)}.")
    choices: list[tuple[Any, Any]] = []
    for of in kv_dtypes:
        named = is_format_name(of) and of != "auto"
        scaled = kv_format(of).is_fp8 if named else not isinstance(of, KVPlan | str | os.PathLike)
        choices += [(of, scales) for scales in (kv_scales if scaled else ["auto"])]
    return choices


def _label(llm: LLM, scales: Any) -> str:
    if isinstance(scales, KVScales):
        return f"{llm.kv_dtype}, {scales.granularity}"
    return llm.kv_dtype if scales == "auto" else f"{llm.kv_dtype}, {scales}"


@dataclasses.dataclass(frozen=True)
class _Round:
    """What one run of all requests came to."""

    seconds: float
    first_token_s: float
    spent: dict[str, float]  # of each counter of `llm.stats`


def _run(llm: LLM, prompts: list[list[int]], output_tokens: int) -> _Round:
    before, began = llm.stats.to_dict(), time.perf_counter()
    outs = llm.generate(
        prompts, max_tokens=output_tokens, temperature=0.0, ignore_eos=True, progress=False
    )
    seconds, after = time.perf_counter() - began, llm.stats.to_dict()
    first = statistics.median(out.first_token_s for out in outs if out.first_token_s is not None)
    return _Round(seconds, first, {name: after[name] - before[name] for name in after})


def _medians(
    label: str,
    llm: LLM,
    found: list[_Round],
    *,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
) -> CacheBenchmark:
    timed, stats = found[-rounds:], llm.stats  # the one before compiled

    def rate(tokens: int, counter: str) -> float:
        return statistics.median(tokens / max(each.spent[counter], 1e-9) for each in timed)

    return CacheBenchmark(
        kv_dtype=label,
        attention=llm.attention,
        bytes_per_token=stats.kv_bytes_per_token,
        tokens_capacity=stats.kv_tokens_capacity,
        fit=stats.kv_tokens_capacity // (prompt_tokens + output_tokens),
        first_token_s=statistics.median(each.first_token_s for each in timed),
        prefill_tokens_s=rate(requests * (prompt_tokens - 1), "prefill_s")
        if prompt_tokens > 1
        else None,
        decode_tokens_s=rate(requests * output_tokens, "decode_s"),
        output_tokens_s=statistics.median(
            requests * output_tokens / each.seconds for each in timed
        ),
        preemptions=statistics.median(each.spent["preemptions"] for each in timed),
        compile_s=llm.compile_report().seconds,
    )
