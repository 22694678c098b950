"""What must hold whatever runs beside a request, on a tiny real model: DESIGN's invariants, in float32 and both FP8 formats."""

import dataclasses

import numpy as np
import pytest

import jfp8kv
from jfp8kv.core.errors import CapacityError
from tests.engines import only, poisoned, used_pages
from tests.models.test_decoder import REFERENCES

FOLDER = REFERENCES[0].parent / "llama_gqa"
FORMATS = ["float32", "fp8_e4m3", "fp8_e5m2"]
SIZES = {"max_model_len": 128, "max_num_seqs": 4, "page_size": 8, "kv_cache_memory": "200kB"}


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER, dtype="float32")


@pytest.fixture(scope="module", params=FORMATS)
def llm(request, params) -> jfp8kv.LLM:
    """An engine whose pool holds NaN codes wherever nothing was written."""
    return poisoned(jfp8kv.LLM(params, kv_dtype=request.param, max_num_batched_tokens=64, **SIZES))


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 200, rng.integers(1, longest)).tolist() for _ in range(count)]


def tokens(outputs) -> list[list[int]]:
    return [out.token_ids for out in outputs]


GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


def test_batched_is_alone(llm) -> None:
    many = prompts(7)
    together = tokens(llm.generate(many, **GREEDY))
    assert together == [llm.generate([p], **GREEDY)[0].token_ids for p in many]
    assert all(len(t) == 12 for t in together)


def test_chunked_prefill_is_whole_prefill(llm, params) -> None:
    whole = tokens(llm.generate(prompts(4), **GREEDY))
    dtype = llm._engine.cache_config.name
    small = poisoned(jfp8kv.LLM(params, kv_dtype=dtype, max_num_batched_tokens=16, **SIZES))
    assert tokens(small.generate(prompts(4), **GREEDY)) == whole


def other(llm: jfp8kv.LLM, params: jfp8kv.Params, **changed) -> jfp8kv.LLM:
    """Another engine with the same kind of cache, poisoned too."""
    sizes = {"max_num_batched_tokens": 64} | SIZES | changed
    return poisoned(jfp8kv.LLM(params, kv_dtype=llm._engine.cache_config.name, **sizes))


def test_a_prefix_hit_gives_the_tokens_of_a_miss(llm, params) -> None:
    rng = np.random.default_rng(50)
    beginning = rng.integers(5, 200, 45).tolist()
    alike = [
        beginning[: int(rng.integers(8, 45))]
        + rng.integers(5, 200, int(rng.integers(1, 30))).tolist()
        for _ in range(9)
    ]
    sharing, apart = other(llm, params), other(llm, params, prefix_caching=False)
    assert tokens(sharing.generate(alike, **GREEDY)) == tokens(apart.generate(alike, **GREEDY))
    again = [
        out.prompt_token_ids + out.token_ids + [7, 7]
        for out in sharing.generate(alike[:3], **GREEDY)
    ]
    before = sharing.stats.prefix_hit_tokens
    assert before > 0 == apart.stats.prefix_hit_tokens
    assert tokens(sharing.generate(again, **GREEDY)) == tokens(apart.generate(again, **GREEDY))
    assert sharing.stats.prefix_hit_tokens >= before + sum(len(ids) // 8 * 8 - 8 for ids in again)


def test_preempted_is_not_preempted(llm, params) -> None:
    many, sampling = (
        prompts(6, seed=51, longest=40),
        {"max_tokens": 30, "temperature": 0.8, "seed": 3, "ignore_eos": True},
    )
    want = tokens(llm.generate(many, **sampling))
    for sharing in (True, False):
        engine = other(llm, params, prefix_caching=sharing)
        with only(engine, pages=16):
            assert tokens(engine.generate(many, **sampling)) == want
        assert engine.stats.preemptions > 0


def test_a_stream_loses_and_repeats_nothing_when_it_is_preempted() -> None:
    llm = jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), **SIZES)
    sampling = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True}
    alone = [llm.generate("abc", seed=i, **sampling)[0].text for i in range(3)]
    with only(llm, pages=9):
        streams = [llm.stream("abc", seed=i, **sampling) for i in range(3)]
        texts = [""] * 3
        going = set(range(3))
        while going:
            for i in sorted(going):
                piece = next(streams[i], None)
                texts[i] += piece or ""
                going -= {i} if piece is None else set()
    assert texts == alone and llm.stats.preemptions > 0


def test_generated_tokens_are_the_argmax_of_the_logits(llm) -> None:
    (prompt,) = prompts(1, seed=3)
    made = llm.generate([prompt], **GREEDY)[0].token_ids
    logits = llm.logits(prompt + made[:-1])
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == made


def test_a_seeded_text_does_not_depend_on_place_or_company(llm) -> None:
    sampling = {"max_tokens": 10, "temperature": 1.0, "ignore_eos": True}
    (prompt,), others = prompts(1, seed=5), prompts(5, seed=6)
    alone = llm.generate([prompt], seed=11, **sampling)[0].token_ids
    params = [jfp8kv.SamplingParams(seed=s, **sampling) for s in (1, 2, 3, 11, 5, 6)]
    assert llm.generate([*others[:3], prompt, *others[3:]], params)[3].token_ids == alone
    assert llm.generate([prompt], seed=12, **sampling)[0].token_ids != alone


def test_unseeded_requests_differ_and_another_engine_with_the_same_seed_repeats_them(
    params,
) -> None:
    runs = []
    for _ in range(2):
        llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", seed=3, max_num_batched_tokens=64, **SIZES)
        runs.append(tokens(llm.generate([[9, 8, 7]] * 3, max_tokens=10, ignore_eos=True)))
    assert runs[0] == runs[1] and len({tuple(t) for t in runs[0]}) == 3


def test_n_continuations_differ_and_the_first_is_that_of_n_1(llm) -> None:
    sampling = {"max_tokens": 8, "seed": 4, "ignore_eos": True}
    (out,) = llm.generate([[5, 6, 7]], n=3, **sampling)
    assert [c.index for c in out.outputs] == [0, 1, 2] and len(
        {tuple(c.token_ids) for c in out.outputs}
    ) == 3
    assert llm.generate([[5, 6, 7]], **sampling)[0].token_ids == out.outputs[0].token_ids


def test_unwritten_slots_never_reach_an_output(llm) -> None:
    """The pool is poisoned, and its pages are handed round by more requests than fit at once."""
    for out in llm.generate(
        prompts(9, seed=8), max_tokens=5, temperature=0.0, logprobs=2, ignore_eos=True
    ):
        assert all(np.isfinite(list(step.values())).all() for step in out.outputs[0].logprobs)
        assert np.isfinite(out.outputs[0].cumulative_logprob)


def test_every_page_comes_back(llm) -> None:
    llm.generate(prompts(6, seed=9), max_tokens=7)
    allocator = llm._engine.scheduler.kv_manager.allocator
    assert allocator.free_pages == allocator.num_pages and llm.stats.kv_tokens_used == 0


def test_a_stream_that_is_dropped_gives_its_pages_back(params) -> None:
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    llm = jfp8kv.LLM(params, max_num_batched_tokens=64, **SIZES)
    stream = llm.stream("abc", max_tokens=60, ignore_eos=True, temperature=1.0, seed=1)
    next(stream)
    assert used_pages(llm) > 0
    stream.close()
    assert used_pages(llm) == 0


def test_a_failed_step_frees_everything_and_the_next_call_is_served(params, monkeypatch) -> None:
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", max_num_batched_tokens=64, **SIZES)
    want = tokens(llm.generate(prompts(3), **GREEDY))
    programs, calls = llm._engine.programs, []
    real = programs.call

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "call", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate(prompts(3), **GREEDY)
    assert used_pages(llm) == 0
    assert tokens(llm.generate(prompts(3), **GREEDY)) == want


def test_failed_logits_leave_an_engine_that_works(params, monkeypatch) -> None:
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", max_num_batched_tokens=64, **SIZES)
    want = llm.logits([5, 6, 7])
    program = llm._engine.programs
    real = program.call

    def lost(step, batch, pages, **static):
        real(step, batch, pages, **static)  # the pool is donated, and its successor lost
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(program, "call", lost)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.logits([5, 6, 7])
    monkeypatch.setattr(program, "call", real)
    assert np.array_equal(llm.logits([5, 6, 7]), want) and used_pages(llm) == 0


def test_what_only_sampling_needs_does_not_recompile_prefill(params) -> None:
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", max_num_batched_tokens=64, **SIZES)
    llm.generate([[5] * 20], max_tokens=2)
    built = sum(p.step == "prefill" for p in llm._engine.programs.compiled)
    llm.generate(
        [[5] * 20],
        max_tokens=3,
        min_tokens=2,
        presence_penalty=1.0,
        logit_bias={3: 1.0},
        stop_token_ids=range(9),
    )
    assert sum(p.step == "prefill" for p in llm._engine.programs.compiled) == built


def test_a_request_too_large_for_the_pool_is_refused_with_what_would_do(params) -> None:
    sizes = SIZES | {"kv_cache_memory": "10kB"}
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", max_num_batched_tokens=64, **sizes)
    capacity = llm.stats.kv_tokens_capacity
    with pytest.raises(CapacityError, match=r"kv_cache_memory of at least (\d+) bytes") as error:
        llm.generate([[5] * 30], max_tokens=capacity)
    enough = int(str(error.value).split("at least ")[1].split(" ")[0])
    roomy = jfp8kv.LLM(
        params,
        kv_dtype="fp8_e4m3",
        max_num_batched_tokens=64,
        **sizes | {"kv_cache_memory": enough},
    )
    assert len(
        roomy.generate([[5] * 30], max_tokens=capacity, ignore_eos=True)[0].token_ids
    ) == min(capacity, 128 - 30)


def test_output_stops_where_the_context_ends(llm) -> None:
    (out,) = llm.generate([[5] * 120], max_tokens=50, ignore_eos=True)
    assert len(out.token_ids) == 8 and out.outputs[0].finish_reason == "length"


def test_stats_count_what_happened(params) -> None:
    llm = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", max_num_batched_tokens=64, **SIZES)
    llm.generate([[5] * 20, [6] * 3], max_tokens=4, ignore_eos=True)
    config, stats = params.config, llm.stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (23, 8)
    assert stats.kv_bytes_per_token == 2 * config.layers * config.kv_heads * config.head_dim
    assert stats.kv_tokens_capacity * stats.kv_bytes_per_token <= 200_000
    assert dataclasses.asdict(stats) == stats.to_dict()
