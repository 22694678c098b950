"""Invariants of generation (docs/design.md) on a tiny model, in float32 and both FP8 formats.

Tokens do not depend on batching, chunked prefill, prefix cache hits or preemption.
"""

import dataclasses

import numpy as np
import pytest

import jfp8kv
from jfp8kv.core.errors import CapacityError
from tests.engines import limit_free_pages, poisoned, used_pages
from tests.models.test_decoder import REFERENCES

FOLDER = REFERENCES[0].parent / "llama_gqa"
FORMATS = ["float32", "fp8_e4m3", "fp8_e5m2"]
SIZES = {"max_model_len": 128, "max_num_seqs": 4, "page_size": 8, "kv_cache_memory": "200kB"}
GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER, dtype="float32")


@pytest.fixture(scope="module", params=FORMATS)
def llm(request, params) -> jfp8kv.LLM:
    """An LLM whose pool has NaN codes in all slots that were not written."""
    return poisoned(jfp8kv.LLM(params, kv_dtype=request.param, max_num_batched_tokens=64, **SIZES))


def fp8_llm(params: jfp8kv.Params, **options) -> jfp8kv.LLM:
    return jfp8kv.LLM(
        params, **{"kv_dtype": "fp8_e4m3", "max_num_batched_tokens": 64} | SIZES | options
    )


def same_cache(llm: jfp8kv.LLM, params: jfp8kv.Params, **options) -> jfp8kv.LLM:
    """Return another LLM with the same cache format, poisoned too."""
    return poisoned(fp8_llm(params, kv_dtype=llm.kv_dtype, **options))


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 200, rng.integers(1, longest)).tolist() for _ in range(count)]


def tokens(outputs) -> list[list[int]]:
    return [out.token_ids for out in outputs]


def test_batched_requests_give_the_tokens_of_single_ones(llm) -> None:
    batch = prompts(7)
    batched = tokens(llm.generate(batch, **GREEDY))
    assert batched == [llm.generate([prompt], **GREEDY)[0].token_ids for prompt in batch]
    assert all(len(output) == 12 for output in batched)


def test_chunked_prefill_gives_the_tokens_of_whole_prefill(llm, params) -> None:
    whole = tokens(llm.generate(prompts(4), **GREEDY))
    chunked = same_cache(llm, params, max_num_batched_tokens=16)
    assert tokens(chunked.generate(prompts(4), **GREEDY)) == whole


def test_a_prefix_cache_hit_gives_the_tokens_of_a_miss(llm, params) -> None:
    rng = np.random.default_rng(50)
    prefix = rng.integers(5, 200, 45).tolist()
    batch = [
        prefix[: int(rng.integers(8, 45))] + rng.integers(5, 200, int(rng.integers(1, 30))).tolist()
        for _ in range(9)
    ]
    caching = same_cache(llm, params)
    without = same_cache(llm, params, prefix_caching=False)
    assert tokens(caching.generate(batch, **GREEDY)) == tokens(without.generate(batch, **GREEDY))
    extended = [
        out.prompt_token_ids + out.token_ids + [7, 7]
        for out in caching.generate(batch[:3], **GREEDY)
    ]
    before = caching.stats.prefix_hit_tokens
    assert before > 0 == without.stats.prefix_hit_tokens
    got = tokens(caching.generate(extended, **GREEDY))
    assert got == tokens(without.generate(extended, **GREEDY))
    hits = caching.stats.prefix_hit_tokens - before
    assert hits >= sum(len(ids) // 8 * 8 - 8 for ids in extended)


def test_preempted_requests_give_the_tokens_of_undisturbed_ones(llm, params) -> None:
    batch = prompts(6, seed=51, longest=40)
    sampling = {"max_tokens": 30, "temperature": 0.8, "seed": 3, "ignore_eos": True}
    want = tokens(llm.generate(batch, **sampling))
    for prefix_caching in (True, False):
        small = same_cache(llm, params, prefix_caching=prefix_caching)
        with limit_free_pages(small, pages=16):
            assert tokens(small.generate(batch, **sampling)) == want
        assert small.stats.preemptions > 0


def test_a_preempted_stream_loses_and_repeats_no_text() -> None:
    llm = jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), **SIZES)
    sampling = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True}
    alone = [llm.generate("abc", seed=i, **sampling)[0].text for i in range(3)]
    with limit_free_pages(llm, pages=9):
        streams = [llm.stream("abc", seed=i, **sampling) for i in range(3)]
        texts = [""] * 3
        unfinished = set(range(3))
        while unfinished:
            for i in sorted(unfinished):
                piece = next(streams[i], None)
                texts[i] += piece or ""
                if piece is None:
                    unfinished.remove(i)
    assert texts == alone and llm.stats.preemptions > 0


def test_greedy_tokens_are_the_argmax_of_the_logits(llm) -> None:
    (prompt,) = prompts(1, seed=3)
    output = llm.generate([prompt], **GREEDY)[0].token_ids
    logits = llm.logits(prompt + output[:-1])
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == output


def test_seeded_output_does_not_depend_on_the_batch(llm) -> None:
    sampling = {"max_tokens": 10, "temperature": 1.0, "ignore_eos": True}
    (prompt,), others = prompts(1, seed=5), prompts(5, seed=6)
    alone = llm.generate([prompt], seed=11, **sampling)[0].token_ids
    params = [jfp8kv.SamplingParams(seed=seed, **sampling) for seed in (1, 2, 3, 11, 5, 6)]
    assert llm.generate([*others[:3], prompt, *others[3:]], params)[3].token_ids == alone
    assert llm.generate([prompt], seed=12, **sampling)[0].token_ids != alone


def test_unseeded_requests_differ_and_repeat_with_the_seed_of_the_engine(params) -> None:
    runs = [
        tokens(fp8_llm(params, seed=3).generate([[9, 8, 7]] * 3, max_tokens=10, ignore_eos=True))
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len({tuple(output) for output in runs[0]}) == 3


def test_n_continuations_differ_and_the_first_is_that_of_n_1(llm) -> None:
    sampling = {"max_tokens": 8, "seed": 4, "ignore_eos": True}
    (out,) = llm.generate([[5, 6, 7]], n=3, **sampling)
    assert [completion.index for completion in out.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in out.outputs}) == 3
    assert llm.generate([[5, 6, 7]], **sampling)[0].token_ids == out.outputs[0].token_ids


def test_unwritten_slots_never_reach_an_output(llm) -> None:
    """The pool is poisoned, and more requests than fit at once reuse its pages."""
    sampling = {"max_tokens": 5, "temperature": 0.0, "logprobs": 2, "ignore_eos": True}
    for out in llm.generate(prompts(9, seed=8), **sampling):
        assert all(np.isfinite(list(top.values())).all() for top in out.outputs[0].logprobs)
        assert np.isfinite(out.outputs[0].cumulative_logprob)


def test_all_pages_are_free_after_generation(llm) -> None:
    llm.generate(prompts(6, seed=9), max_tokens=7)
    assert used_pages(llm) == 0 and llm.stats.kv_bytes_used == llm.stats.kv_tokens_used == 0


def test_closing_a_stream_frees_its_pages() -> None:
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    llm = jfp8kv.LLM(params, max_num_batched_tokens=64, **SIZES)
    stream = llm.stream("abc", max_tokens=60, ignore_eos=True, temperature=1.0, seed=1)
    next(stream)
    assert used_pages(llm) > 0
    stream.close()
    assert used_pages(llm) == 0


def test_after_a_failed_step_all_pages_are_free_and_the_next_call_is_served(
    params, monkeypatch
) -> None:
    llm = fp8_llm(params)
    want = tokens(llm.generate(prompts(3), **GREEDY))
    programs, calls = llm.engine.programs, []
    call = programs.call

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        return call(*args, **kwargs)

    monkeypatch.setattr(programs, "call", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate(prompts(3), **GREEDY)
    assert used_pages(llm) == 0
    assert tokens(llm.generate(prompts(3), **GREEDY)) == want


def test_an_engine_whose_pool_was_lost_is_usable_again(params, monkeypatch) -> None:
    llm = fp8_llm(params)
    want = llm.logits([5, 6, 7])
    programs = llm.engine.programs
    call = programs.call

    def losing(step, batch, pages, **static):
        call(step, batch, pages, **static)  # the pool is donated, and the new one is lost
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(programs, "call", losing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.logits([5, 6, 7])
    monkeypatch.setattr(programs, "call", call)
    assert np.array_equal(llm.logits([5, 6, 7]), want) and used_pages(llm) == 0


def test_sampling_options_do_not_recompile_prefill(params) -> None:
    llm = fp8_llm(params)

    def prefills() -> int:
        return sum(program.step == "prefill" for program in llm.compile_report().steps)

    llm.generate([[5] * 20], max_tokens=2)
    before = prefills()
    llm.generate(
        [[5] * 20],
        max_tokens=3,
        min_tokens=2,
        presence_penalty=1.0,
        logit_bias={3: 1.0},
        stop_token_ids=range(9),
    )
    assert prefills() == before > 0


def test_a_request_too_large_for_the_pool_is_refused_with_the_size_it_needs(params) -> None:
    small = fp8_llm(params, kv_cache_memory="10kB")
    capacity = small.stats.kv_tokens_capacity
    with pytest.raises(CapacityError, match=r"kv_cache_memory of at least (\d+) bytes") as error:
        small.generate([[5] * 30], max_tokens=capacity)
    enough = int(str(error.value).split("at least ")[1].split(" ")[0])
    large = fp8_llm(params, kv_cache_memory=enough)
    output = large.generate([[5] * 30], max_tokens=capacity, ignore_eos=True)[0].token_ids
    assert len(output) == min(capacity, 128 - 30)


def test_output_ends_at_the_context_length(llm) -> None:
    (out,) = llm.generate([[5] * 120], max_tokens=50, ignore_eos=True)
    assert len(out.token_ids) == 8 and out.outputs[0].finish_reason == "length"


def test_stats_count_tokens_and_bytes(params) -> None:
    llm = fp8_llm(params)
    llm.generate([[5] * 20, [6] * 3], max_tokens=4, ignore_eos=True)
    config, stats = params.config, llm.stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (23, 8)
    assert stats.kv_bytes_per_token == 2 * config.layers * config.kv_heads * config.head_dim
    assert stats.kv_tokens_capacity * stats.kv_bytes_per_token <= 200_000
    assert dataclasses.asdict(stats) == stats.to_dict()
