"""After a warm-up nothing compiles, and the report lists what was compiled."""

import contextlib
import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import jfp8kv
from jfp8kv import SamplingParams
from jfp8kv.sampling.state import FULL, PLAIN, SamplerVariant, variant_of
from tests.engines import used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_bf16"
SIZES = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "max_model_len": 128,
    "page_size": 8,
    "kv_cache_memory": "200kB",
}


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER)


@pytest.fixture(scope="module")
def llm(params) -> jfp8kv.LLM:
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **SIZES)
    llm.warmup(branches=True)
    return llm


def random_sampling(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """Return parameters with a few random fields set."""

    def token_ids(limit: int) -> list[int]:
        return rng.choice(vocab, size=rng.integers(1, limit), replace=False).tolist()

    fields: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.7, 1.3])),
        "top_k": int(rng.integers(0, 20)),
        "top_p": float(rng.uniform(0.3, 1)),
        "min_p": float(rng.uniform(0, 0.3)),
        "repetition_penalty": float(rng.uniform(0.8, 1.5)),
        "presence_penalty": float(rng.uniform(-1, 1)),
        "frequency_penalty": float(rng.uniform(-1, 1)),
        "stop": ["e", "the"][: rng.integers(1, 3)],
        "stop_token_ids": token_ids(60),
        "ignore_eos": bool(rng.integers(2)),
        "n": int(rng.integers(1, 3)),
        "logprobs": int(rng.integers(0, 21)),
        "prompt_logprobs": int(rng.integers(0, 5)),
        "seed": int(rng.integers(0, 2**40)),
        "logit_bias": dict.fromkeys(token_ids(200), float(rng.uniform(-5, 5))),
        "min_tokens": 2,
    }
    chosen = rng.choice(list(fields), size=rng.integers(0, 6), replace=False)
    max_tokens = int(rng.integers(2, 7))
    return SamplingParams(max_tokens=max_tokens, **{name: fields[name] for name in chosen})


@contextlib.contextmanager
def xla_compilations() -> Iterator[list[str]]:
    """Record what XLA compiles in the context, by the library or without its knowledge."""
    seen: list[str] = []

    def listen(name: str, *_, **__) -> None:
        if "backend_compile" in name:
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_500_requests_with_any_parameters_compile_nothing(llm, caplog) -> None:
    rng, vocab = np.random.default_rng(0), llm.params.config.vocab
    compiled, served = llm.stats.compilations, 0
    with xla_compilations() as seen:
        while served < 500:
            count = int(rng.integers(1, 40))
            prompts = [rng.integers(5, vocab, rng.integers(1, 100)).tolist() for _ in range(count)]
            streams = [
                llm.stream(prompts[0], max_tokens=20, temperature=1.0)
                for _ in range(rng.integers(0, 3))
            ]
            for stream in streams:
                next(stream, None)
            outs = llm.generate(prompts, [random_sampling(rng, vocab) for _ in range(count)])
            for stream in streams:
                stream.close()
            for completion in (completion for out in outs for completion in out.outputs):
                ended = completion.finish_reason == "stop"
                assert 0 < len(completion.token_ids) <= 6 or ended
            served += sum(len(out.outputs) for out in outs) + len(streams)
        with llm.session([5, 6, 7]) as session, session.fork() as branch:
            branch.extend([8] * 9)
            branch.extend([8])
            branch.generate(max_tokens=3, presence_penalty=1.0)
            jfp8kv.extend_batch([session, branch], [[7] * 30, 8])
        jfp8kv.beam_search(llm, [[5, 6, 7], [8] * 50], beams=4, max_tokens=5)
    assert llm.stats.compilations == compiled and seen == []
    assert "compiled step" not in caplog.text
    assert used_pages(llm) == 0


def test_longer_id_lists_than_those_of_the_full_sampler_compile_one_program(llm, caplog) -> None:
    vocab = llm.params.config.vocab
    base = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    compiled = llm.stats.compilations
    for token in (7, 8):
        ends = [t for t in range(vocab) if t != token][:80]
        out = llm.generate([[5, 6]], logit_bias={token: 1e6}, stop_token_ids=ends, **base)[0]
        assert out.token_ids == [token] * 3
    assert llm.stats.compilations == compiled + 1
    assert llm.compile_report().steps[-1].variant == "full, 128 ends, 512 biased"
    (record,) = [record for record in caplog.records if "compiled step" in record.getMessage()]
    assert record.levelname == "WARNING" and "while serving" in record.getMessage()


def test_the_full_and_the_plain_sampler_generate_the_same_tokens(llm) -> None:
    prompts = [[5, 6, 7], [9] * 30, [11, 12]]
    for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 3}):
        fields = {"max_tokens": 12, "ignore_eos": True} | sampling
        plain = [out.token_ids for out in llm.generate(prompts, **fields)]
        assert [out.token_ids for out in llm.generate(prompts, logprobs=1, **fields)] == plain


def test_the_smallest_sampler_that_serves_all_requests_is_chosen() -> None:
    assert variant_of([SamplerVariant(1, 0, False), SamplerVariant(8, 0, False)]) == PLAIN
    assert variant_of([SamplerVariant(1, 0, False), SamplerVariant(9, 0, False)]) == FULL
    assert variant_of([SamplerVariant(1, 0, False), SamplerVariant(1, 1, True)]) == FULL
    assert variant_of([SamplerVariant(65, 0, False)]) == SamplerVariant(128, 512, True)


def test_the_report_lists_every_program_with_its_bucket_seconds_and_bytes(params, llm) -> None:
    report = llm.compile_report()
    steps = [(s.step, s.requests, s.tokens, s.variant) for s in report.steps]
    assert len(set(steps)) == len(steps)
    prefill = {("prefill", 1, 28, ""), ("prefill", 2, 28, ""), ("prefill", 1, 56, "")}
    decode = {("decode", rows, 1, variant) for rows in (1, 2, 4) for variant in ("plain", "full")}
    logits = {("logits", 1, 28, ""), ("logits", 1, 56, "")}
    sessions = {("prefill", 1, 1, ""), ("logits", 1, 1, ""), ("copy", 64, 1, "")}
    batched_sessions = {("last_logits", rows, 1, "") for rows in (1, 2, 4)}
    assert set(steps) >= prefill | decode | logits | sessions | batched_sessions
    assert all(s.seconds > 0 and s.temporary_bytes > 0 and s.code_bytes >= 0 for s in report.steps)
    assert sum(not s.shared for s in report.steps) == llm.stats.compilations
    assert report.seconds == pytest.approx(sum(s.seconds for s in report.steps if not s.shared))

    other = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **SIZES)
    other.generate([[5]], max_tokens=2)
    (shared,) = other.compile_report().steps
    assert shared.shared and other.stats.compilations == 0 and other.compile_report().seconds == 0
    assert (shared.step, shared.requests, shared.variant) == ("decode", 1, "plain")


def test_the_report_prints_as_a_table(llm) -> None:
    report = llm.compile_report()
    title, header, *rows = str(report).splitlines()
    compiled = f"{llm.stats.compilations} compiled here in {report.seconds:.1f} s"
    assert title == f"{len(report.steps)} programs, {compiled}"
    assert "requests x tokens" in header
    assert any("decode" in row and "2 x 1" in row and "full" in row for row in rows)
    out = StringIO()
    Console(file=out, width=100).print(report)
    assert "temporaries MiB" in out.getvalue() and "temporaries MiB" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["steps"][0]["step"] == "prefill"
    assert repr(report).startswith(f"CompileReport({len(report.steps)} programs")
