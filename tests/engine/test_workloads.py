"""Random workloads on a tiny model: each output is that of the request alone.

One LLM per format serves all workloads, so each starts with the pages that earlier ones left: pages
to share, pages of other sequences, or NaN codes. `WORKLOADS=500` runs that many for each format.
"""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest

import jfp8kv
from jfp8kv import SamplingParams, StepError
from jfp8kv.engine.request import CANCELLED, Request
from jfp8kv.request_group import RequestGroup
from tests.engines import poisoned, used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

WORKLOADS = int(os.environ.get("WORKLOADS", "12"))
# The longest sequence takes all but two pages, and four requests run at a time.
SIZES = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 4, "max_num_batched_tokens": 16}
PAGES = 18
TEMPLATES = 36


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt and its sampling parameters."""

    prompt: tuple[int, ...]
    params: SamplingParams


def random_template(
    rng: np.random.Generator, prefixes: list[list[int]], vocab: int, seed: int
) -> Template:
    """Return a prompt, with a common prefix or without, and random sampling parameters."""
    prefix = prefixes[rng.integers(3)][: int(rng.choice([0, 6, 17, 30]))]
    prompt = (*prefix, *rng.integers(5, vocab, int(rng.integers(1, 12))).tolist())
    fields: dict[str, Any] = {
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
    if rng.integers(2):  # all of them: each combination would be another program to compile
        fields |= {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.2,
            "logprobs": 2,
            "logit_bias": {7: 2.0, 9: float("-inf")},
            "min_tokens": 1,
            "stop_token_ids": [int(rng.integers(vocab))],
        }
    return Template(prompt, SamplingParams(seed=seed, **fields))


def random_templates(vocab: int) -> list[Template]:
    """Return the templates of all workloads."""
    rng = np.random.default_rng(7)
    prefixes = [rng.integers(5, vocab, 30).tolist() for _ in range(3)]
    return [random_template(rng, prefixes, vocab, seed) for seed in range(TEMPLATES)]


def new_llm(params: jfp8kv.Params, kv_dtype: str, **options) -> jfp8kv.LLM:
    """Return an LLM with `PAGES` pages."""
    probe = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory="100kB", **SIZES)
    memory = PAGES * probe.engine.cache_config.page_bytes
    return jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_cache_memory=memory, **SIZES, **options)


def reset(llm: jfp8kv.LLM) -> None:
    """Empty the prefix cache and fill every page with NaN codes."""
    llm.engine.abandon((), StepError("reset"))
    poisoned(llm)


def new_groups(llm: jfp8kv.LLM, templates: list[Template]) -> list[RequestGroup]:
    """Return the requests of templates."""
    prompts = [list(template.prompt) for template in templates]
    return llm._requests.build(prompts, [template.params for template in templates], {})


def run(llm: jfp8kv.LLM, rng: np.random.Generator, groups: list[RequestGroup]) -> None:
    """Run all requests from arrival to completion. Some are cancelled on the way."""
    arrivals: dict[Request, int] = {}
    for group in groups:
        arrival = int(rng.integers(0, 12))
        arrivals |= dict.fromkeys(group.requests, arrival)
    cancellations = {
        request: int(rng.integers(0, 30)) for request in arrivals if rng.random() < 0.15
    }
    for number in range(5000):
        for request, arrival in arrivals.items():
            if arrival == number:
                llm.engine.add(request)
        cancelled = [r for r, when in cancellations.items() if when == number >= arrivals[r]]
        llm.engine.cancel(cancelled)
        llm.engine.step()  # here, not in the engine thread, which is idle
        if number >= 30 and all(request.finish_reason for request in arrivals):
            return
    raise AssertionError("requests that never finish")


def check(got: Request, want: Request, where: str, *, exact_sums: bool) -> None:
    """Compare a request with the same request run alone."""
    if got.finish_reason == CANCELLED:
        assert got.output_ids == want.output_ids[: len(got.output_ids)], where
        return
    assert (got.output_ids, got.text) == (want.output_ids, want.text), where
    assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason), where
    if exact_sums:
        np.testing.assert_allclose(
            got.output_logprobs, want.output_logprobs, rtol=0, atol=1e-4, err_msg=where
        )


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8_e4m3", "fp8_e5m2"])
def test_random_workloads_give_the_output_of_single_requests_and_free_all_pages(kv_dtype) -> None:
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    templates = random_templates(params.config.vocab)
    alone = new_llm(params, kv_dtype, prefix_caching=False)
    want: list[list[Request]] = []
    for template in templates:
        (group,) = new_groups(alone, [template])
        for request in group.requests:
            reset(alone)
            alone._driver.run([request])
        want.append(group.requests)

    llm = new_llm(params, kv_dtype)
    for seed in range(WORKLOADS):
        rng = np.random.default_rng(seed)
        if rng.random() < 0.5:
            reset(llm)
        chosen = rng.integers(0, TEMPLATES, int(rng.integers(1, 9))).tolist()
        groups = new_groups(llm, [templates[index] for index in chosen])
        run(llm, rng, groups)
        for index, group in zip(chosen, groups, strict=True):
            for got, expected in zip(group.requests, want[index], strict=True):
                # In FP8 another order of sums may round to another code: about one in a thousand.
                where = f"workload {seed}, request {index}"
                check(got, expected, where, exact_sums=kv_dtype == "float32")
        scheduler = llm.engine.scheduler
        assert not scheduler.waiting and not scheduler.running and llm.stats.kv_bytes_used == 0
        assert used_pages(llm) == 0, f"workload {seed}: pages are lost"
    assert llm.stats.preemptions > WORKLOADS / 10
    assert llm.stats.prefix_hit_tokens > 10 * WORKLOADS
