"""Sessions: texts that stay in the cache, extended, taken back and branched in any order, are what they are if run anew."""

import gc

import numpy as np
import pytest

import jfp8kv
from jfp8kv.cache.pages import fill
from jfp8kv.core.errors import CapacityError, ConfigError
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

PAGE = 8
SIZES = {"max_model_len": 96, "max_num_seqs": 2, "page_size": PAGE, "max_num_batched_tokens": 16}


def engine(family: str = "llama_gqa", memory="400kB", **cache) -> jfp8kv.LLM:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    llm = jfp8kv.LLM(params, kv_cache_memory=memory, **SIZES, **{"kv_cache_dtype": "fp8_e4m3"} | cache)
    llm._engine.pages = fill(llm._engine.pages, 0xFF)
    return llm


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return engine()


def pages(llm: jfp8kv.LLM) -> int:
    llm._engine.free_dropped()
    return llm._engine.scheduler.paging.allocator.used_pages


@pytest.mark.parametrize(("family", "sharing"), [("llama_gqa", True), ("llama_gqa", False), ("gemma3_new", True)])
def test_any_tree_of_texts_has_the_logits_of_each_text_run_anew(family, sharing) -> None:
    llm = engine(family, memory="2MB", prefix_caching=sharing)
    rng = np.random.default_rng(0)
    vocab = llm.params.config.vocab
    oracle = engine(family, memory="2MB", prefix_caching=False)
    sessions = [llm.session(rng.integers(0, vocab, 21).tolist())]
    for _ in range(14):
        session = sessions[rng.integers(len(sessions))]
        move = rng.choice(["extend", "rollback", "fork", "generate"], p=[0.5, 0.2, 0.2, 0.1])
        if move == "extend" and len(session) < 70:
            new = rng.integers(0, vocab, rng.integers(1, 20)).tolist()
            got = session.extend(new)
            want = oracle.logits(session.token_ids)[-len(new) :]
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
        elif move == "rollback":
            before, back = session.token_ids, int(rng.integers(0, len(session) - 1))
            session.rollback(back)
            assert session.token_ids == before[: len(before) - back]
        elif move == "fork":
            sessions.append(session.fork())
            assert sessions[-1].token_ids == session.token_ids
        elif move == "generate" and 0 < len(session) < 70:
            before = session.token_ids
            out = session.generate(max_tokens=6, temperature=0.0, ignore_eos=True)
            assert session.token_ids == before + out.token_ids
            assert out.token_ids == oracle.generate([before], max_tokens=6, temperature=0.0, ignore_eos=True)[0].token_ids
    for session in sessions:
        session.close()
    assert pages(llm) == 0


def test_branches_share_whole_pages_and_each_frees_its_own(llm) -> None:
    stem = llm.session(list(range(3, 3 + 3 * PAGE + 2)))
    assert pages(llm) == 4
    branch = stem.fork()
    assert pages(llm) == 5, "three pages are shared, and the last one is each one's own"
    assert stem.pages[0][:3] == branch.pages[0][:3] and stem.pages[0][3] != branch.pages[0][3]
    branch.extend([1] * PAGE)
    assert pages(llm) == 6
    stem.close()
    assert pages(llm) == 5
    del branch
    gc.collect()
    assert pages(llm) == 0


def test_a_session_is_freed_at_the_end_of_a_with_and_then_refuses_everything(llm) -> None:
    with llm.session([5, 6, 7]) as session:
        assert pages(llm) == 1 and len(session) == 3
    assert pages(llm) == 0
    session.close()
    for call in (
        lambda: session.extend([1]),
        lambda: session.rollback(1),
        session.fork,
        session.generate,
        lambda: len(session),
    ):
        with pytest.raises(ConfigError, match="this session is closed: make another with llm.session"):
            call()


@pytest.mark.parametrize("tokens", [-1, 4, True, 1.0])
def test_a_rollback_past_the_beginning_is_refused(llm, tokens) -> None:
    with llm.session([5, 6, 7]) as session, pytest.raises(ConfigError, match="from 0 to 3"):
        session.rollback(tokens)


def test_what_cannot_be_added_leaves_the_text_as_it_was(llm) -> None:
    with llm.session([5, 6, 7]) as session:
        for wrong, says in (
            ([10_000], "ids must be from 0"),
            ([1] * 96, "max_model_len=96"),
            ("abc", "tokenizer"),
            ([], "empty"),
        ):
            with pytest.raises(ConfigError, match=says):
                session.extend(wrong)
        with pytest.raises(ConfigError, match="fork it for several"):
            session.generate(n=2)
        assert session.token_ids == [5, 6, 7]


def test_a_prompt_that_others_ask_for_is_shared_with_a_session(llm) -> None:
    with llm.session([9] * 40):
        before = llm.stats.prefix_hit_tokens
        llm.generate([[9] * 40 + [1, 2, 3]], max_tokens=2)
        assert llm.stats.prefix_hit_tokens == before + 40


def test_sessions_that_hold_all_memory_are_named_in_the_refusal_and_the_next_call_is_served() -> None:
    llm = engine(memory=6 * engine()._engine.kv.page_bytes)
    with llm.session([7] * 24), llm.session([9] * 17) as session:
        with pytest.raises(CapacityError, match="while sessions hold the rest: close some"):
            llm.generate([[8] * 20], max_tokens=4)
        with pytest.raises(CapacityError, match="while sessions hold the rest"):
            session.extend([1] * 10)
        assert session.token_ids == [9] * 17 and session.extend([1]).shape[0] == 1
    assert len(llm.generate([[8] * 20], max_tokens=4, ignore_eos=True)[0].token_ids) == 4


@pytest.mark.parametrize("taken_by", ["session", "score"])
def test_others_take_room_from_requests_that_run_and_those_lose_nothing(taken_by) -> None:
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    sampling = {"max_tokens": 30, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    alone = jfp8kv.LLM(params, kv_cache_memory="400kB", **SIZES).generate("abc", **sampling)[0].text
    llm = jfp8kv.LLM(params, kv_cache_memory="400kB", **SIZES)
    tight = jfp8kv.LLM(params, kv_cache_memory=8 * llm._engine.kv.page_bytes, **SIZES)
    stream = tight.stream("abc", **sampling)
    text = next(stream)
    taken = getattr(tight, taken_by)([7] * 60)
    assert tight.stats.preemptions == 1
    if taken_by == "session":
        taken.close()
    assert text + "".join(stream) == alone


def test_after_a_failed_step_a_session_goes_on(monkeypatch) -> None:
    llm = engine()
    with llm.session(list(range(20))) as session:
        want = llm.logits([*range(20), 5])[-1:]

        def failing(*args, **kwargs):
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as broken:
            broken.setattr(llm._engine.programs, "call", failing)
            with pytest.raises(RuntimeError, match="the device is gone"):
                session.extend([5])
        assert session.token_ids == list(range(20))
        np.testing.assert_allclose(session.extend([5]), want, rtol=0, atol=2e-5)
    assert pages(llm) == 0
