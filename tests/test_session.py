"""Sessions: extended, rolled back and forked in any order, they match sequences without a cache."""

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import jfp8kv
from jfp8kv.core.errors import CapacityError, ConfigError
from tests.engines import tiny_llm, used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

PAGE = 8
SIZES = {"max_model_len": 96, "max_num_seqs": 2, "page_size": PAGE, "max_num_batched_tokens": 16}
MEMORY = {"kv_cache_memory": "400kB"}


def engine(family: str = "llama_gqa", **options) -> jfp8kv.LLM:
    return tiny_llm(family, **SIZES | MEMORY | options)


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return engine()


TREES = {
    "one format, full attention": {},
    "no prefix caching": {"prefix_caching": False},
    "two formats, token-head scales, windows": {
        "family": "gemma3_new",
        "kv_dtype": {"default": "fp8_e5m2", "skip": [0]},
        "kv_scales": "token_head",
    },
    "RoPE that depends on the length": {"family": "phi3_longrope_cross"},
}


@pytest.mark.parametrize("kind", TREES.values(), ids=TREES)
def test_any_tree_of_sessions_has_the_logits_of_uncached_sequences(kind) -> None:
    llm, oracle = (
        engine(**{"kv_cache_memory": "2MB"} | kind | apart)
        for apart in ({}, {"prefix_caching": False})
    )
    rng = np.random.default_rng(0)
    vocab, most = llm.params.config.vocab, llm.max_model_len - 26

    def some(count: int) -> list[int]:
        return rng.integers(0, vocab, count).tolist()

    sessions = [llm.session(some(21))]
    for _ in range(18):
        session = sessions[rng.integers(len(sessions))]
        move = rng.choice(
            ["extend", "all", "rollback", "fork", "generate"], p=[0.25, 0.25, 0.2, 0.2, 0.1]
        )
        if move == "extend" and len(session) < most:
            new = some(rng.integers(1, 20))
            got = session.extend(new)
            want = oracle.logits(session.token_ids)[-len(new) :]
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
        elif move == "all" and (chosen := [each for each in sessions if len(each) < most]):
            longest = int(rng.choice([1, 20]))
            got = jfp8kv.extend_batch(chosen, [some(rng.integers(1, longest + 1)) for _ in chosen])
            want = [oracle.logits(each.token_ids)[-1] for each in chosen]
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
        elif move == "rollback":
            before, back = session.token_ids, int(rng.integers(0, len(session) - 1))
            session.rollback(back)
            assert session.token_ids == before[: len(before) - back]
        elif move == "fork":
            sessions.append(session.fork())
            assert (
                sessions[-1].token_ids == session.token_ids and sessions[-1].pages == session.pages
            )
        elif move == "generate" and 0 < len(session) < most:
            before = session.token_ids
            out = session.generate(max_tokens=6, temperature=0.0, ignore_eos=True)
            assert session.token_ids == before + out.token_ids
            assert (
                out.token_ids
                == oracle.generate([before], max_tokens=6, temperature=0.0, ignore_eos=True)[
                    0
                ].token_ids
            )
    for session in sessions:
        session.close()
    assert used_pages(llm) == 0


@pytest.fixture
def ran(llm, monkeypatch) -> list[str]:
    """The names of the steps that were dispatched."""
    names, call = [], llm.engine.programs.call

    def counted(step, *args, **kwargs):
        names.append(step.__name__)
        return call(step, *args, **kwargs)

    monkeypatch.setattr(llm.engine.programs, "call", counted)
    return names


def test_a_fork_computes_and_copies_nothing_and_the_first_write_copies_the_page(llm, ran) -> None:
    trunk = llm.session(list(range(3, 3 + 3 * PAGE + 2)))
    assert used_pages(llm) == 4
    ran.clear()
    branch = trunk.fork()
    twig = branch.fork()
    assert not ran and used_pages(llm) == 4 and trunk.pages == branch.pages == twig.pages
    branch.extend([1])
    assert ran == ["copy", "logits"] and used_pages(llm) == 5
    assert trunk.pages[0][:3] == branch.pages[0][:3] and trunk.pages[0][3] != branch.pages[0][3]
    trunk.close()
    ran.clear()
    twig.extend([2])
    assert ran == ["logits"] and used_pages(llm) == 5, "the page had no other owner"
    branch.extend([1] * PAGE)
    assert used_pages(llm) == 6
    twig.close()
    del branch
    gc.collect()
    assert used_pages(llm) == 0


def test_a_rolled_back_session_is_extended_without_copy_or_recompute(llm, ran) -> None:
    with llm.session(list(range(3, 3 + 2 * PAGE))) as session:
        before = session.pages
        ran.clear()
        session.rollback(3)
        session.extend([5])
        assert ran == ["logits"] and session.pages == before
        session.rollback(6)
        session.rollback(0)
        assert (
            ran == ["logits"] and len(session) == 2 * PAGE - 8 and session.pages[0] == before[0][:1]
        )


def test_cached_tokens_are_run_only_if_their_logits_are_requested(llm, ran) -> None:
    ids = list(range(60, 60 + 3 * PAGE))
    with llm.session(ids) as trunk, llm.session([9]) as other, llm.session(ids[:PAGE]) as third:
        want = llm.logits(ids)
        other.rollback(1)
        ran.clear()
        np.testing.assert_allclose(other.extend(ids), want, rtol=0, atol=2e-5)
        assert ran == ["logits", "logits"]
        ran.clear()
        np.testing.assert_allclose(
            jfp8kv.extend_batch([third], [ids[PAGE:]])[0], want[-1], rtol=0, atol=2e-5
        )
        assert ran == ["copy", "last_logits"] and third.pages[0][:2] == trunk.pages[0][:2]
        out = third.generate(max_tokens=2 * PAGE + 2, temperature=0.0, ignore_eos=True)
        assert ran[-1] == "prefill" and ran.count("prefill") == 1, (
            "of the output, the end that fills no page"
        )
        np.testing.assert_allclose(
            third.extend([5])[0], llm.logits([*ids, *out.token_ids, 5])[-1], rtol=0, atol=2e-5
        )


def test_several_sessions_are_extended_in_one_dispatch(llm, ran) -> None:
    with llm.session([9] * 20) as trunk, trunk.fork() as branch:
        ran.clear()
        jfp8kv.extend_batch([trunk, branch], [1, [2]])
        assert (
            ran == ["copy", "last_logits"]
            and trunk.token_ids[-1] == 1
            and branch.token_ids[-1] == 2
        )
        for sessions, new, message in (
            ([], [], "0 sessions"),
            ([trunk], [1, 2], "2 tokens for 1 sessions"),
            ([trunk, trunk], [1, 2], "the same session twice"),
            ([trunk, branch], [1, []], "empty"),
            ([trunk, branch], [1, 10_000], "ids must be from 0"),
        ):
            with pytest.raises(ConfigError, match=message):
                jfp8kv.extend_batch(sessions, new)
        assert len(trunk) == len(branch) == 21


def test_a_fork_in_a_full_pool_is_unchanged_by_errors_and_extended_once_there_is_room() -> None:
    llm = engine(kv_cache_memory=7 * engine().engine.cache_config.page_bytes)
    with llm.session([7] * 24) as other, llm.session([9] * 17) as trunk:
        branches = [trunk.fork() for _ in range(3)]
        assert used_pages(llm) == 6
        want = trunk.extend([1])
        with pytest.raises(CapacityError, match="Open sessions own the others"):
            branches[0].extend([1])
        with pytest.raises(CapacityError, match="Open sessions own the others"):
            jfp8kv.extend_batch(branches, [1, 1, 1])
        assert {len(branch) for branch in branches} == {17} and used_pages(llm) == 7
        other.close()
        np.testing.assert_allclose(
            jfp8kv.extend_batch(branches, [1, 1, 1]), np.tile(want[-1], (3, 1)), rtol=0, atol=2e-5
        )
        for branch in branches:
            branch.close()


def test_new_pages_of_a_batch_are_freed_when_one_session_finds_no_room() -> None:
    llm = engine(kv_cache_memory=6 * engine().engine.cache_config.page_bytes)
    with llm.session([7] * 24), llm.session([9] * 16) as trunk, trunk.fork() as branch:
        assert used_pages(llm) == 5
        with pytest.raises(CapacityError, match="Open sessions own the others"):
            jfp8kv.extend_batch([trunk, branch], [1, 2])
        assert used_pages(llm) == 5 and trunk.pages == branch.pages
        assert trunk.extend([1]).shape[0] == 1 and used_pages(llm) == 6


def test_threads_that_extend_the_same_sessions_in_any_order_never_deadlock(llm) -> None:
    with llm.session([9] * 20) as one, one.fork() as other:

        def extend(sessions: list[jfp8kv.Session]) -> None:
            for _ in range(5):
                jfp8kv.extend_batch(sessions, [1, 1])

        with ThreadPoolExecutor() as threads:
            list(threads.map(extend, [[one, other], [other, one], [one, other]]))
        assert one.token_ids == other.token_ids == [9] * 20 + [1] * 15


@pytest.mark.parametrize("prompt", [5, 20])
def test_continuations_of_one_prompt_prefill_it_once(llm, ran, prompt) -> None:
    ids = list(range(40, 40 + prompt))
    sampling = {"max_tokens": 6, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    ran.clear()
    out = llm.generate([ids], n=2, **sampling)[0]
    assert (
        ran.count("prefill") == -(-(prompt - 1) // llm.engine.buckets.max_prefill_chunk)
        and ran.count("copy") == 1
    )
    apart = engine(prefix_caching=False).generate([ids], n=2, **sampling)[0]
    assert [each.token_ids for each in out.outputs] == [each.token_ids for each in apart.outputs]
    assert used_pages(llm) == 0


def test_a_session_is_freed_at_the_end_of_a_with_and_then_refuses_all_calls(llm) -> None:
    with llm.session([5, 6, 7]) as session:
        assert used_pages(llm) == 1 and len(session) == 3
    assert used_pages(llm) == 0
    session.close()
    for call in (
        lambda: session.extend([1]),
        lambda: session.rollback(1),
        session.fork,
        session.generate,
        lambda: len(session),
    ):
        with pytest.raises(
            ConfigError, match="this session is closed: create another with llm.session"
        ):
            call()


@pytest.mark.parametrize("tokens", [-1, 4, True, 1.0])
def test_a_rollback_of_an_invalid_number_of_tokens_is_refused(llm, tokens) -> None:
    with llm.session([5, 6, 7]) as session, pytest.raises(ConfigError, match="from 0 to 3"):
        session.rollback(tokens)


def test_invalid_tokens_leave_the_session_unchanged(llm) -> None:
    with llm.session([5, 6, 7]) as session:
        for wrong, message in (
            ([10_000], "ids must be from 0"),
            ([1] * 96, "max_model_len=96"),
            ("abc", "tokenizer"),
            ([], "empty"),
            (1.5, "tokens=1.5: must be a str, a token id or a list"),
        ):
            with pytest.raises(ConfigError, match=message):
                session.extend(wrong)
        for fields, message in (
            ({"n": 2}, r"use n=1, or fork\(\) for several"),
            ({"prompt_logprobs": 1}, "try llm.score"),
        ):
            with pytest.raises(ConfigError, match=message):
                session.generate(**fields)
        assert session.token_ids == [5, 6, 7]


def test_a_request_shares_the_pages_of_a_session_with_the_same_prefix(llm) -> None:
    with llm.session([9] * 40):
        before = llm.stats.prefix_hit_tokens
        llm.generate([[9] * 40 + [1, 2, 3]], max_tokens=2)
        assert llm.stats.prefix_hit_tokens == before + 40


def test_a_refusal_names_the_sessions_that_own_the_pages_and_the_next_call_is_served() -> None:
    llm = engine(kv_cache_memory=6 * engine().engine.cache_config.page_bytes)
    with llm.session([7] * 24), llm.session([9] * 17) as session:
        with pytest.raises(CapacityError, match="Open sessions own the others: close some"):
            llm.generate([[8] * 20], max_tokens=4)
        with pytest.raises(CapacityError, match="Open sessions own the others"):
            session.extend([1] * 10)
        assert session.token_ids == [9] * 17 and session.extend([1]).shape[0] == 1
    assert len(llm.generate([[8] * 20], max_tokens=4, ignore_eos=True)[0].token_ids) == 4


def test_a_request_that_just_finished_is_not_refused_for_lack_of_pages() -> None:
    """Its stop string is found after the scheduler finds no pages for its next tokens."""
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    llm = jfp8kv.LLM(params, **SIZES | MEMORY)
    sampling = {"max_tokens": 40, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    with contextlib.closing(llm.stream("abc", **sampling)) as stream:
        first, second = next(stream), next(stream)
    stop = second[2:5]
    tight = jfp8kv.LLM(params, **SIZES, kv_cache_memory=8 * llm.engine.cache_config.page_bytes)
    with tight.session([7] * 41):
        with pytest.raises(CapacityError, match="Open sessions own the others"):
            tight.generate("abc", **sampling)
        assert (
            tight.generate("abc", stop=stop, **sampling)[0].text
            == (first + second)[: (first + second).index(stop)]
        )
    assert tight.stats.preemptions == 2


@pytest.mark.parametrize("caller", ["session", "score", "logits"])
def test_a_running_request_loses_nothing_when_others_need_its_pages(caller) -> None:
    """A session preempts it at once. The session is closed before the request continues."""
    params = jfp8kv.load(REFERENCES[0], dtype="float32")
    sampling = {"max_tokens": 30, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    llm = jfp8kv.LLM(params, **SIZES | MEMORY)
    alone = llm.generate("abc", **sampling)[0].text
    tight = jfp8kv.LLM(params, kv_cache_memory=8 * llm.engine.cache_config.page_bytes, **SIZES)
    stream = tight.stream("abc", **sampling)
    text = next(stream)
    result = getattr(tight, caller)([7] * 60)
    assert tight.stats.preemptions == (caller == "session"), "scores wait like other requests"
    if caller == "session":
        result.close()
    assert text + "".join(stream) == alone


def test_a_session_and_its_forks_survive_a_failed_step(monkeypatch) -> None:
    llm = engine()
    with llm.session(list(range(20))) as session, session.fork() as branch:
        want = llm.logits([*range(20), 5])[-1:]

        def failing(*args, **kwargs):
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as broken:
            broken.setattr(llm.engine.programs, "call", failing)
            with pytest.raises(RuntimeError, match="the device is gone"):
                session.extend([5])
        assert session.token_ids == branch.token_ids == list(range(20))
        twig = branch.fork()
        for each in (session, branch, twig):
            np.testing.assert_allclose(each.extend([5]), want, rtol=0, atol=2e-5)
        twig.close()
    assert used_pages(llm) == 0
