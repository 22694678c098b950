"""Random workloads on a tiny real model: whatever ran beside it, a text is that of its request alone, and all pages return.

An engine for each format stays the same over all workloads, so that each finds what earlier ones left: pages that may be shared
and pages that hold other texts, or NaN codes. `WORKLOADS=500` runs so many for each format.
"""

import dataclasses
import os

import numpy as np
import pytest

import jfp8kv
from jfp8kv import SamplingParams, StepError
from jfp8kv.engine.request import CANCELLED, Request, RequestGroup
from tests.engines import poisoned
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

WORKLOADS = int(os.environ.get("WORKLOADS", "12"))
# The longest text takes all but two pages, and four run at a time.
SIZES = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 4, "max_num_batched_tokens": 16}
PAGES, KINDS = 18, 36


@dataclasses.dataclass(frozen=True)
class Kind:
    """A prompt and how to go on with it."""

    prompt: tuple[int, ...]
    params: SamplingParams


def kinds(vocab: int) -> list[Kind]:
    """Prompts with beginnings in common, and every field that has a say in what is chosen."""
    rng = np.random.default_rng(7)
    beginnings = [rng.integers(5, vocab, 30).tolist() for _ in range(3)]
    made = []
    for seed in range(KINDS):
        shared = beginnings[rng.integers(3)][: int(rng.choice([0, 6, 17, 30]))]
        prompt = (*shared, *rng.integers(5, vocab, int(rng.integers(1, 12))).tolist())
        fields = {
            "max_tokens": int(rng.integers(1, 22)),
            "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.5])),
            "top_k": int(rng.choice([0, 0, 20])),
            "top_p": float(rng.choice([1.0, 0.9])),
            "min_p": float(rng.choice([0.0, 0.05])),
            "n": int(rng.choice([1, 1, 1, 3])),
            "ignore_eos": bool(rng.integers(2)),
            "stop_token_ids": rng.integers(5, vocab, int(rng.integers(0, 6))).tolist(),
            "stop": ["e", "th"][: rng.integers(3)],
        }
        if rng.integers(
            2
        ):  # all of them together: each combination of these would be a program of its own
            fields |= {
                "repetition_penalty": 1.3,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.2,
                "logprobs": 2,
            }
            fields |= {
                "logit_bias": {7: 2.0, 9: float("-inf")},
                "min_tokens": 1,
                "stop_token_ids": [int(rng.integers(vocab))],
            }
        made.append(Kind(prompt, SamplingParams(seed=seed, **fields)))
    return made


def engine(params: jfp8kv.Params, kv_dtype: str, **options) -> jfp8kv.LLM:
    page_bytes = jfp8kv.LLM(
        params, kv_dtype=kv_dtype, kv_cache_memory="100kB", **SIZES
    )._engine.cache_config.page_bytes
    return jfp8kv.LLM(
        params, kv_dtype=kv_dtype, kv_cache_memory=PAGES * page_bytes, **SIZES, **options
    )


def poison(llm: jfp8kv.LLM) -> None:
    """Forget what is cached, and let every page hold NaN codes."""
    llm._engine.abandon((), StepError("forgotten"))
    poisoned(llm)


def groups(llm: jfp8kv.LLM, chosen: list[Kind]) -> list[RequestGroup]:
    return llm._groups([list(kind.prompt) for kind in chosen], [kind.params for kind in chosen], {})


def run(llm: jfp8kv.LLM, rng: np.random.Generator, asked: list[RequestGroup]) -> None:
    """All requests from arrival to their end, some dropped on the way."""
    requests = [r for group in asked for r in group.requests]
    arrives = {
        id(r): turn
        for group in asked
        for turn in [int(rng.integers(0, 12))]
        for r in group.requests
    }
    leaves = {id(r): int(rng.integers(0, 30)) for r in requests if rng.random() < 0.15}
    for turn in range(5000):
        for request in requests:
            if arrives[id(request)] == turn:
                llm._engine.add(request)
        llm._engine.cancel(
            r for r in requests if leaves.get(id(r)) == turn and arrives[id(r)] <= turn
        )
        llm._engine.step()  # here, not in the engine thread, which is idle
        if turn >= 30 and all(r.finish_reason for r in requests):
            return
    raise AssertionError("requests that never end")


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8_e4m3", "fp8_e5m2"])
def test_every_text_is_that_of_the_request_alone_and_every_page_comes_back(kv_dtype) -> None:
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    all_kinds = kinds(params.config.vocab)
    alone = engine(params, kv_dtype, prefix_caching=False)
    want: dict[int, list[Request]] = {}
    for which, kind in enumerate(all_kinds):
        (group,) = groups(alone, [kind])
        for request in group.requests:
            poison(alone)
            alone._driver.run([request])
        want[which] = group.requests

    llm = engine(params, kv_dtype)
    for seed in range(WORKLOADS):
        rng = np.random.default_rng(seed)
        if rng.random() < 0.5:
            poison(llm)
        chosen = rng.integers(0, KINDS, int(rng.integers(1, 9))).tolist()
        asked = groups(llm, [all_kinds[which] for which in chosen])
        run(llm, rng, asked)
        for which, group in zip(chosen, asked, strict=True):
            for got, expected in zip(group.requests, want[which], strict=True):
                where = f"workload {seed}, request {which}"
                if got.finish_reason == CANCELLED:
                    assert got.output_ids == expected.output_ids[: len(got.output_ids)], where
                    continue
                assert (got.output_ids, got.text) == (expected.output_ids, expected.text), where
                assert (got.finish_reason, got.stop_reason) == (
                    expected.finish_reason,
                    expected.stop_reason,
                ), where
                if (
                    kv_dtype == "float32"
                ):  # sums in another order may round to another code of FP8, for a thousandth or so
                    np.testing.assert_allclose(
                        got.output_logprobs,
                        expected.output_logprobs,
                        rtol=0,
                        atol=1e-4,
                        err_msg=where,
                    )
        scheduler = llm._engine.scheduler
        assert not scheduler.waiting and not scheduler.running and llm.stats.kv_bytes_used == 0
        assert scheduler.kv_manager.allocator.free_pages == PAGES, (
            f"workload {seed}: pages are lost"
        )
    assert llm.stats.preemptions > WORKLOADS / 10 and llm.stats.prefix_hit_tokens > 10 * WORKLOADS
