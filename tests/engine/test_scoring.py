"""Scores and logits of given sequences: batched, with prefix reuse, and with any mix of callers."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp8kv
from jfp8kv import CapacityError, ConfigError, StepError
from jfp8kv.engine import buckets, step
from jfp8kv.engine.programs import Programs
from jfp8kv.engine.request import PrefillOutput
from jfp8kv.engine.scheduler import ScheduledPrefill
from jfp8kv.engine.scoring import ScoreRequest
from jfp8kv.text.prompts import EncodedPair
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile
FOLDER = REFERENCES[0].parent / "llama_bf16"
SIZES = {
    "kv_dtype": "float32",
    "page_size": 8,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 2,
}
PAIRS = [
    ("the end", " of it"),
    ("the sea and the sky", None),
    ("a house", " by the sea"),
    ([5, 6, 7], None),
    ("no", None),
]


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def llm(params) -> jfp8kv.LLM:
    return jfp8kv.LLM(params, kv_cache_memory="1MB", **SIZES)


@pytest.fixture(scope="module")
def small(params, llm) -> jfp8kv.LLM:
    """An engine whose pool has 12 pages, 96 tokens."""
    memory = 12 * llm.engine.cache_config.page_bytes
    return jfp8kv.LLM(params, kv_cache_memory=memory, **SIZES)


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, list[int]]]:
    """The name of each step that ran, and the tokens of each request in it without padding."""
    call, ran = Programs.call, []

    def recorded(self, function, batch, pages, **rest):
        forward = getattr(batch, "forward", batch)
        if hasattr(forward, "length"):
            tokens = np.asarray(forward.length) - np.asarray(forward.start)
            ran.append((function.__name__, [int(count) for count in tokens if count]))
        return call(self, function, batch, pages, **rest)

    monkeypatch.setattr(Programs, "call", recorded)
    return ran


def ids(llm, pair) -> list[int]:
    prompt, completion = pair
    return prompt if isinstance(prompt, list) else llm.tokenizer.encode(prompt + (completion or ""))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(llm, token_ids) -> np.ndarray:
    """The log-probabilities in float64, from the logits."""
    logprobs = log_softmax(llm.logits(token_ids)[:-1])
    return logprobs[np.arange(len(token_ids) - 1), token_ids[1:]]


def check(llm, pairs, found) -> None:
    """Check the results of `score_iter` against the logits of each sequence."""
    for number, (prompt, completion) in enumerate(pairs):
        before = 0 if completion is None else len(llm.tokenizer.encode(prompt))
        assert found[number].prompt_tokens == before
        want = reference(llm, ids(llm, (prompt, completion)))[max(0, before - 1) :]
        np.testing.assert_allclose(found[number].logprobs, want, atol=1e-5)


def test_scores_are_those_of_each_sequence_alone_and_similar_lengths_run_together(llm, ran):
    found = dict(llm.score_iter(PAIRS))
    scored = [tokens for name, tokens in ran if name == "logprobs"]
    assert sorted(found) == list(range(len(PAIRS)))
    assert max(map(len, scored)) > 1
    assert sum(map(sum, scored)) == sum(len(ids(llm, pair)) - 1 for pair in PAIRS)
    assert llm.stats.kv_bytes_used == 0
    check(llm, PAIRS, found)


def test_score_accepts_one_prompt_or_a_list_in_any_form(llm):
    prompts = ["the sea and the sky", [5, 6, 7], [{"role": "user", "content": "hello"}]]
    found = llm.score(prompts)
    for prompt, scores in zip(prompts, found, strict=True):
        alone = llm.score(prompt)
        assert scores.dtype == alone.dtype == np.float32
        np.testing.assert_allclose(scores, alone, atol=1e-5)
    np.testing.assert_allclose(found[1], reference(llm, [5, 6, 7]), atol=1e-5)
    with pytest.raises(ConfigError, match="prompts is empty"):
        llm.score([])
    with pytest.raises(ConfigError, match="nothing to score"):
        llm.score(["the sea", [5]])


def test_sequences_that_cannot_be_scored_yield_their_errors_and_the_others_run(llm):
    invalid = [("", None), ("a", ""), ([5], None), ("the " * 300, None)]
    found = dict(llm.score_iter([*PAIRS, *invalid]))
    errors = [type(found[len(PAIRS) + i]) for i in range(len(invalid))]
    assert errors == [ConfigError] * 3 + [CapacityError]
    check(llm, PAIRS, found)


def test_a_sequence_whose_step_fails_does_not_fail_the_others(llm, monkeypatch):
    call, failing = Programs.call, [5, 5, 5, 5]

    def fails(self, function, batch, pages, **rest):
        if function is step.logprobs and any(
            row[:3] == failing[:3] for row in batch.forward.tokens.tolist()
        ):
            raise RuntimeError("the device is on fire")
        return call(self, function, batch, pages, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(Programs, "call", fails)
        found = dict(llm.score_iter([*PAIRS, (failing, None)]))
    assert isinstance(found[len(PAIRS)], StepError)
    assert "the device is on fire" in str(found[len(PAIRS)])
    check(llm, PAIRS, found)


def test_a_programming_error_is_raised_and_not_yielded_as_a_result(llm, monkeypatch):
    def broken(engine, pair):
        raise TypeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(ScoreRequest, "of", broken)
        with pytest.raises(TypeError, match="a bug"):
            list(llm.score_iter(PAIRS))
    assert llm.stats.kv_bytes_used == 0 and len(dict(llm.score_iter(PAIRS))) == len(PAIRS)


def test_a_prompt_in_the_prefix_cache_is_not_run_again(llm, ran):
    pairs = [("I said no to the", f" {word}") for word in ("end", "sea")]
    (first,) = dict(llm.score_iter(pairs[:1])).values()
    ran.clear()
    found = dict(llm.score_iter(pairs))
    assert found[0].logprobs == pytest.approx(first.logprobs, abs=1e-5)
    assert sum(sum(tokens) for _, tokens in ran) <= 2 * 8, "only tokens of the last page"
    check(llm, pairs, found)


# -- one pool, many callers ------------------------------------------------------------------------


def in_threads(*functions) -> list:
    """Call each function in a thread and return the results, or raise the first error."""
    results: list = [None] * len(functions)
    errors: list[BaseException] = []

    def call(number: int) -> None:
        try:
            results[number] = functions[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "it waits forever"
    if errors:
        raise errors[0]
    return results


def sequences(seed: int, count: int, longest: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 60, random.integers(2, longest)).tolist() for _ in range(count)]


def test_threads_that_score_with_a_small_pool_all_finish(small):
    rows = [sequences(seed, 24, longest=80) for seed in range(4)]

    def score(mine):
        return lambda: dict(small.score_iter((row, None) for row in mine))

    for mine, found in zip(rows, in_threads(*map(score, rows)), strict=True):
        assert [found[i] for i in range(24) if isinstance(found[i], Exception)] == []
        for i in range(0, 24, 6):
            np.testing.assert_allclose(found[i].logprobs, reference(small, mine[i]), atol=1e-5)
    assert small.stats.kv_bytes_used == 0


def test_scores_logits_generation_and_sessions_share_a_small_pool(small):
    row, prompt = [7] * 60, [9] * 20
    sampling = {"max_tokens": 30, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    alone = small.generate([prompt], **sampling)[0].token_ids
    logits, scores = small.logits(row), small.score(row)
    preempted = small.stats.preemptions
    with small.session([5] * 9) as session:
        found = in_threads(
            lambda: dict(small.score_iter((row, None) for _ in range(6))),
            lambda: [small.generate([prompt], **sampling)[0].token_ids for _ in range(3)],
            lambda: [small.generate([prompt] * 2, **sampling)[1].token_ids for _ in range(3)],
            lambda: [small.logits(row) for _ in range(4)],
            lambda: [small.score(row) for _ in range(4)],
            lambda: [session.extend([6]) for _ in range(4)],
        )
        assert session.token_ids == [5] * 9 + [6] * 4
    scored, first, second, full, single, _ = found
    for i in range(6):
        np.testing.assert_allclose(scored[i].logprobs, scores, atol=1e-5)
    assert all(tokens == alone for tokens in [*first, *second])
    for each in full:
        np.testing.assert_allclose(each, logits, atol=1e-4)
    for each in single:
        np.testing.assert_allclose(each, scores, atol=1e-5)
    assert small.stats.kv_bytes_used == 0 and small.stats.preemptions >= preempted


def test_only_sessions_make_a_sequence_that_fits_the_pool_fail(small):
    row = [7] * 80
    with small.session([5] * 40):
        with pytest.raises(CapacityError, match="Open sessions own the others"):
            small.score(row)
        (number, result), *others = small.score_iter([(row, None), (row[:30], None)])
        failed = dict([(number, result), *others])
        assert isinstance(failed[0], CapacityError) and len(failed[1].logprobs) == 29
    assert len(small.score(row)) == 79
    with pytest.raises(CapacityError, match="give kv_cache_memory of at least"):
        small.score([7] * 100)


def test_a_preempted_sequence_is_scored_as_without_preemption(params, small):
    """The second request is admitted while the first is short, and loses its pages to it later."""
    rows = [[7] * 70, [8] * 70]
    sampling = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.0, "prompt_logprobs": 0}
    want = [small.generate([row[:10]], **sampling)[0] for row in rows]
    before = small.stats.preemptions
    found = small.generate([row[:10] for row in rows], **sampling)
    assert small.stats.preemptions > before
    for mine, theirs in zip(found, want, strict=True):
        assert mine.token_ids == theirs.token_ids
        for a, b in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


# -- prompt log-probabilities ----------------------------------------------------------------------


def test_prompt_logprobs_have_the_top_tokens_of_the_logits(llm):
    row = ids(llm, ("the sea and the sky and the end of it all, said the house by the sea", None))
    (out,) = llm.generate([row], max_tokens=1, prompt_logprobs=3, n=2)
    want = log_softmax(llm.logits(row))
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(row)
    for position in range(1, len(row)):
        found, logprobs = out.prompt_logprobs[position], want[position - 1]
        top = np.argsort(-logprobs, kind="stable")[:3].tolist()
        assert set(found) == {*top, row[position]}
        assert found == pytest.approx({i: logprobs[i] for i in found}, abs=1e-5)
    (single,) = llm.generate([[5]], max_tokens=1, prompt_logprobs=3)
    assert single.prompt_logprobs == [None]


# -- memory of logits ------------------------------------------------------------------------------


def test_logits_of_a_chunk_stay_below_one_cap_for_all_callers(llm, ran, monkeypatch):
    vocab = llm.params.config.vocab
    row = np.random.default_rng(0).integers(3, 60, 50).tolist()
    logits, scores = llm.logits(row), llm.score(row)
    with llm.session(row[:5]) as session:
        extended = session.extend(row[5:])
    monkeypatch.setattr(buckets, "MAX_LOGITS_BYTES", 4 * vocab * 40)
    ran.clear()
    np.testing.assert_allclose(llm.logits(row), logits, atol=1e-4)
    np.testing.assert_allclose(llm.score(row[:-1]), scores[:-1], atol=1e-5)
    with llm.session(row[:5]) as session:
        np.testing.assert_allclose(session.extend(row[5:]), extended, atol=1e-4)
    assert [tokens for name, tokens in ran if name == "logits"] == [[30], [20], [30], [15]]


def test_log_probabilities_never_materialize_more_logits_than_the_cap(llm, monkeypatch):
    engine = llm.engine
    vocab = engine.params.config.vocab
    monkeypatch.setattr(buckets, "MAX_LOGITS_BYTES", 4 * vocab * 20)
    (request,) = ScoreRequest.of(engine, EncodedPair([5] * 30, 0)).requests
    requests = [request, request]
    plan = ScheduledPrefill(requests, [28, 28], 28, PrefillOutput.LOGPROBS)
    batch = engine.batch_builder.logprobs(plan)
    programs = engine.programs

    def run(weights, scales, batch, pages):
        return step.logprobs(engine.model, weights, scales, batch, pages, top=4)

    jaxpr = jax.make_jaxpr(run)(programs.weights, programs.scales, batch, engine.pages)
    sizes = [
        variable.aval.size
        for variable in intermediates(jaxpr.jaxpr)
        if getattr(variable.aval, "shape", ())[-1:] == (vocab,)
        and variable.aval.dtype == jnp.float32
    ]
    assert max(sizes) == 20 * vocab, "56 tokens in blocks of 20"


def intermediates(jaxpr):
    """The results of all operations of a jaxpr and of the jaxprs in it."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from intermediates(inner)


def test_a_warm_engine_scores_batches_of_any_size_without_compiling(llm):
    llm.warmup()
    compiled = llm.stats.compilations
    for count in (1, 2, 5):
        for length in (2, 20, 50, 90):
            rows = [[5 + i] * length for i in range(count)]
            assert [len(scores) for scores in llm.score(rows)] == [length - 1] * count
            assert len(dict(llm.score_iter((row, None) for row in rows))) == count
            llm.generate(rows, max_tokens=1, prompt_logprobs=2)
    llm.logits([5] * 50)
    assert llm.stats.compilations == compiled
