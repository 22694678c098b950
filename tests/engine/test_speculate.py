"""Prompt lookup changes no text: what is verified several tokens at a time is what is decoded one by one, and drawn alike.

Tiny models of random weights repeat nothing, so most tests leave them three tokens to choose from (`logit_bias`): then what was
said before comes again often, and often does not.
"""

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

import jfp8kv
from jfp8kv.engine.request import Request
from jfp8kv.engine.speculative import _made
from tests.engine.fake_device import PAGE_SIZE, FakeDevice, new_request, new_scheduler, next_token
from tests.engines import poisoned
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FORMATS = ["float32", "fp8_e4m3"]  # by hand fp8_e5m2 too: a format is a dtype to all of this
SIZES = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "page_size": 8,
    "kv_cache_memory": "200kB",
    "max_num_batched_tokens": 64,
}
FEW = {7: 60.0, 8: 60.0, 9: 60.0}
CHOICES = {"logit_bias": FEW, "temperature": 1.0, "seed": 5, "max_tokens": 40, "ignore_eos": True}
UNBIASED = {
    "logit_bias": {7: 0.0},
    "max_tokens": 40,
    "ignore_eos": True,
}  # takes the program that `CHOICES` does
REPETITIVE = [[7, 8, 9] * 9, [7, 7, 8, 7, 7, 9, 9, 8], [8], [5, 6, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(REFERENCES[0].parent / "llama_gqa", dtype="float32")


def engine(params: jfp8kv.Params, drafts: int, kv_dtype: str = "fp8_e4m3", **changed) -> jfp8kv.LLM:
    """An engine whose pool holds NaN codes wherever nothing was written, and whose batches are of one size, to compile less."""
    sizes = SIZES | changed
    llm = poisoned(jfp8kv.LLM(params, kv_dtype=kv_dtype, prompt_lookup=drafts, **sizes))
    of = llm._engine
    of.buckets = dataclasses.replace(of.buckets, min_decode_rows=sizes["max_num_seqs"])
    of.batch_builder.buckets = of.scheduler.buckets = of.buckets
    return llm


@pytest.fixture(scope="module")
def plain(params) -> jfp8kv.LLM:
    return engine(params, 0)


@pytest.fixture(scope="module")
def ahead(params) -> jfp8kv.LLM:
    return engine(params, 4)


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 200, rng.integers(1, 50)).tolist() for _ in range(count)]


def tokens(outputs) -> list[list[int]]:
    return [c.token_ids for out in outputs for c in out.outputs]


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_the_texts_are_those_of_plain_decoding(params, kv_dtype) -> None:
    plain, ahead = (engine(params, drafts, kv_dtype) for drafts in (0, 4))
    asked = prompts(4, seed=1) + REPETITIVE
    for sampling in (
        UNBIASED | {"temperature": 0.0},
        UNBIASED | {"temperature": 0.8, "top_p": 0.9, "seed": 3},
        CHOICES,
    ):
        assert tokens(ahead.generate(asked, **sampling)) == tokens(
            plain.generate(asked, **sampling)
        )
    assert 0 < ahead.stats.accepted_tokens < ahead.stats.draft_tokens
    assert ahead.stats.decode_steps < plain.stats.decode_steps
    assert plain.stats.draft_tokens == plain.stats.accepted_tokens == 0
    allocator = ahead._engine.scheduler.kv_manager.allocator
    assert allocator.free_pages == allocator.num_pages


EVERYTHING = {
    "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "stop_token_ids": [9], "min_tokens": 12,
    "logprobs": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "more", [EVERYTHING, {"n": 3}, {"max_tokens": 1}, {"max_tokens": 7, "top_k": 2}], ids=str
)
def test_whatever_is_asked_of_a_text_holds_within_a_pass(plain, ahead, more) -> None:
    for seed in range(4):
        asked = [
            llm.generate(REPETITIVE, **CHOICES | {"seed": seed} | more) for llm in (ahead, plain)
        ]
        for got, want in zip(
            *([c for out in outs for c in out.outputs] for outs in asked), strict=True
        ):
            assert (got.token_ids, got.finish_reason, got.stop_reason) == (
                want.token_ids,
                want.finish_reason,
                want.stop_reason,
            )
            for step, same in zip(got.logprobs or [], want.logprobs or [], strict=True):
                assert step == pytest.approx(same, abs=1e-4)


def test_a_text_ends_in_the_middle_of_an_accepted_run(ahead) -> None:
    """Left one token, a model repeats it: every draft is right, and the text ends where it should all the same."""
    before = dataclasses.replace(ahead.stats)
    sampling = {"logit_bias": {7: 99.0}, "temperature": 0.0}
    (out,) = ahead.generate([[7] * 5], max_tokens=18, **sampling)
    assert out.token_ids == [7] * 18 and out.outputs[0].finish_reason == "length"
    made = ahead.stats.accepted_tokens - before.accepted_tokens
    assert made == ahead.stats.draft_tokens - before.draft_tokens == 14, (
        "4 passes: 1 + 4 tokens, twice, thrice, and 1 + 2"
    )
    (out,) = ahead.generate([[7] * 90], max_tokens=18, **sampling)
    assert out.token_ids == [7] * 6, "the context has no more room"
    sampling["logit_bias"] = {7: 99.0, 8: 50.0}
    (out,) = ahead.generate([[7] * 5], max_tokens=18, min_tokens=8, stop_token_ids=[7], **sampling)
    assert out.token_ids == [8] * 8 + [7] and out.outputs[0].stop_reason == 7


def test_greedy_tokens_made_ahead_are_the_likeliest_as_far_as_rounding_tells() -> None:
    """A pass over several tokens adds up in another order than one over a single token: bfloat16 rounds another way, and FP8
    keeps a neighbouring code. That alone may choose: no token is further from the likeliest than it moves logits (note 017)."""
    llm = engine(jfp8kv.load(REFERENCES[0].parent / "llama_bf16"), 8)
    sampling, few = (
        {"logit_bias": FEW, "temperature": 0.0, "max_tokens": 40, "ignore_eos": True},
        list(FEW),
    )
    for prompt, made in zip(REPETITIVE, tokens(llm.generate(REPETITIVE, **sampling)), strict=True):
        ids, first = prompt + made[:-1], len(prompt) - 1
        at_once = llm.logits(ids)[first:, few]
        with llm.session(prompt) as session:
            session.rollback(1)
            one_by_one = np.stack([session.extend([token])[0, few] for token in ids[first:]])
        rounding = np.abs(at_once - one_by_one).max()
        lost = (
            one_by_one.max(1)
            - one_by_one[np.arange(len(made)), [few.index(token) for token in made]]
        )
        assert lost.max() <= 4 * rounding and rounding < 0.1
    assert llm.stats.accepted_tokens > 0


@pytest.mark.parametrize(
    ("sampled", "drafts", "tried", "made"),
    [
        ([1, 2, 3, 4], [1, 2, 3], 3, 4),
        ([1, 2, 9, 4], [1, 2, 3], 3, 3),
        ([9, 2, 3, 4], [1, 2, 3], 3, 1),
        ([1, 2, 3, 4], [1, 2, 3], 2, 3),
        ([1, 2, 3, 4], [1, 2, 3], 0, 1),
        ([1, 50, 3, 4], [1, 50, 3], 3, 2),
        ([60, 2, 3, 4], [60, 2, 3], 3, 1),
        ([1, 2, 3, 60], [1, 2, 3], 3, 4),
    ],
)
def test_tokens_count_up_to_the_first_that_is_no_draft_or_ends_the_text(
    sampled, drafts, tried, made
) -> None:
    sampled, chunk, ends = (
        jnp.asarray(ids, jnp.int32) for ids in (sampled, [0, *drafts], [50, 60])
    )
    assert _made(sampled, chunk, jnp.int32(tried), ends) == made


def test_a_token_at_a_place_of_drafts_is_drawn_with_the_models_probabilities(params) -> None:
    """Pairs of tokens made in one pass or two: the first decides whether the second stands at a draft's place. The pairs, and
    the second tokens of those that do, are distributed as the logits say."""
    llm = engine(params, 4, "float32", max_num_seqs=16, kv_cache_memory="1MB")
    prompt, count, temperature, few = [7, 8, 9, 8, 9, 7, 8, 9], 16 * 32, 4.0, np.array([7, 8, 9])

    def probabilities(text: list[int]) -> np.ndarray:
        weights = np.exp(llm.logits(text)[-1, few].astype(np.float64) / temperature)
        return weights / weights.sum()

    sampling = {"logit_bias": FEW, "temperature": temperature, "max_tokens": 3, "ignore_eos": True}
    made = np.array(tokens(llm.generate([prompt] * count, **sampling)))
    seen = np.array([[np.sum((made[:, :2] == [a, b]).all(1)) for b in few] for a in few])
    first, second = (
        probabilities(prompt),
        np.stack([probabilities([*prompt, token]) for token in few]),
    )
    # The engine's seed is fixed, so this passes always or never; a right sampler fails for one seed in ten thousand.
    assert stats.chisquare(seen.ravel(), (count * first[:, None] * second).ravel()).pvalue > 1e-4
    drafted = seen[
        1
    ]  # 8, 9 came after 7, 8, 9 before: where 8 comes again, the next token stands where 9 is drafted
    assert drafted.sum() > 300 and stats.chisquare(drafted, drafted.sum() * second[1]).pvalue > 1e-4
    assert llm.stats.accepted_tokens >= drafted.sum()


def test_preemption_and_prefixes_change_no_text(params, plain) -> None:
    asked, sampling = 2 * REPETITIVE[1:], CHOICES | {"max_tokens": 80}
    want = tokens(plain.generate(asked, **sampling))
    page_bytes = plain._engine.cache_config.page_bytes
    for sharing in (True, False):
        tight = engine(params, 4, kv_cache_memory=16 * page_bytes, prefix_caching=sharing)
        assert tokens(tight.generate(asked, **sampling)) == want
        assert tight.stats.preemptions > 0 and tight.stats.accepted_tokens > 0
        assert tight._engine.scheduler.kv_manager.allocator.free_pages == 16


def test_pages_that_held_failed_drafts_are_found_for_what_the_text_came_to(plain, ahead) -> None:
    made = tokens(ahead.generate(REPETITIVE, **CHOICES))
    longer = [prompt + out + [7] for prompt, out in zip(REPETITIVE, made, strict=True)]
    before = ahead.stats.prefix_hit_tokens
    sampling = CHOICES | {"max_tokens": 8}
    assert tokens(ahead.generate(longer, **sampling)) == tokens(plain.generate(longer, **sampling))
    assert ahead.stats.prefix_hit_tokens > before


@pytest.mark.parametrize("family", ["gpt_oss_saved", "phi3_longrope_cross"])
def test_windows_experts_and_ropes_that_depend_on_length_change_no_text(family) -> None:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    sizes = {"max_model_len": 64, "page_size": 4, "max_num_batched_tokens": 16}
    asked = [[7, 8, 9] * 4, [8, 9, 7, 7] * 8, [7]]
    plain, ahead = (engine(params, drafts, **sizes, kv_scales="token_head") for drafts in (0, 4))
    assert tokens(ahead.generate(asked, **CHOICES)) == tokens(plain.generate(asked, **CHOICES))
    assert ahead.stats.accepted_tokens > 0


def test_a_stop_string_cuts_what_was_accepted_past_it(params) -> None:
    tokenizer = jfp8kv.load(REFERENCES[0]).tokenizer
    stops = [tokenizer.decode([8, 8]), tokenizer.decode([7, 9, 7])]
    plain, ahead = (
        engine(jfp8kv.Params(params.tree, params.config, tokenizer), drafts) for drafts in (0, 4)
    )
    sampling = [
        jfp8kv.SamplingParams(**CHOICES | {"stop": stops, "seed": seed}) for seed in range(8)
    ]
    got, want = (llm.generate([REPETITIVE[0]] * 8, sampling) for llm in (ahead, plain))
    assert [(out.text, out.outputs[0].stop_reason) for out in got] == [
        (out.text, out.outputs[0].stop_reason) for out in want
    ]
    assert tokens(got) == tokens(want) and {out.outputs[0].stop_reason for out in got} & set(stops)
    assert ahead.stats.accepted_tokens > 0


def test_a_warm_engine_never_compiles(params) -> None:
    llm = engine(params, 4)
    llm.warmup()
    programs = dict(llm._engine.programs._own)
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.8}):
        llm.generate(REPETITIVE, max_tokens=9, **sampling)
    assert llm._engine.programs._own == programs


class Speculating(FakeDevice):
    """A device that also writes drafts past the text: of those none is right, or one, or all."""

    def decode(self, r: Request, steps: int) -> None:
        for turn in range(steps):
            drafted = min(self.scheduler.buckets.drafts, r.max_tokens - len(r.output_ids) - 1)
            for held in r.page_tables:
                for position in range(r.cached, r.cached + 1 + drafted):
                    page = held.pages[position // PAGE_SIZE - held.first]
                    assert self.scheduler.kv_manager.allocator.ref_count(page) == 1, (
                        "a page that is written has one owner"
                    )
                    self.slots[page, position % PAGE_SIZE] = b"a draft"
            right = (0, 1, drafted)[(turn + r.cached) % 3]
            super().decode(r, 1 + min(drafted, right))


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([0, 9, 40]), st.integers(1, 60), st.integers(1, 40)),
        min_size=1,
        max_size=8,
    ),
    pages=st.integers(45, 120),
    windows=st.booleans(),
)
def test_drafts_lie_in_pages_of_their_own_and_are_never_seen(sizes, pages, windows) -> None:
    sched = new_scheduler(pages + windows * 45, windows=windows)
    sched.buckets = dataclasses.replace(sched.buckets, drafts=3)
    everyone = [
        new_request([1] * shared + [2 + i] * own, output)
        for i, (shared, own, output) in enumerate(sizes)
    ]
    Speculating(sched).run_all(*everyone)
    for r in everyone:
        alone = list(r.prompt_ids)
        for _ in range(r.max_tokens):
            alone.append(next_token(alone))
        assert r.output_ids == alone[len(r.prompt_ids) :]
    assert sched.kv_manager.allocator.free_pages == sched.kv_manager.allocator.num_pages
