"""`LLM.score_iter`: the log-probabilities of `LLM.score`, of several texts in a dispatch."""

import numpy as np
import pytest

import jfp8kv
from jfp8kv.engine import scoring
from jfp8kv.engine.engine import Engine
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile
FOLDER = REFERENCES[0].parent / "llama_bf16"
PAIRS = [
    ("the end", " of it"),
    ("the sea and the sky", None),
    ("a house", " by the sea"),
    ([5, 6, 7], None),
    ("no", None),
]


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    params = jfp8kv.load(FOLDER, dtype="float32")
    cache = {"kv_dtype": "float32", "kv_cache_memory": "1MB", "page_size": 8}
    return jfp8kv.LLM(params, max_num_batched_tokens=64, max_num_seqs=2, **cache)


def ids(llm, pair) -> list[int]:
    prompt, completion = pair
    return prompt if isinstance(prompt, list) else llm.tokenizer.encode(prompt + (completion or ""))


def check(llm, pairs, found) -> None:
    """That it is what `score` says."""
    for number, (prompt, completion) in enumerate(pairs):
        before = 0 if completion is None else len(llm.tokenizer.encode(prompt))
        assert found[number].prompt_tokens == before
        want = llm.score(ids(llm, (prompt, completion)))[max(0, before - 1) :]
        np.testing.assert_allclose(found[number].logprobs, want, atol=1e-5)


@pytest.fixture
def ran(monkeypatch) -> list[list[int]]:
    """For each dispatch the tokens of each text that were run, padding left out."""
    launch, ran = Engine._launch, []

    def counts(self, function, batch, **rest):
        ran.append([int(tokens) for tokens in np.asarray(batch.length - batch.start) if tokens])
        return launch(self, function, batch, **rest)

    monkeypatch.setattr(Engine, "_launch", counts)
    return ran


def test_scores_are_those_of_each_text_alone_and_texts_of_like_length_run_together(
    llm, ran
) -> None:
    found = dict(llm.score_iter(PAIRS))
    assert sorted(found) == list(range(len(PAIRS)))
    assert max(map(len, ran)) > 1 and sum(map(sum, ran)) == sum(
        len(ids(llm, pair)) for pair in PAIRS
    )
    assert llm.stats.kv_bytes_used == 0
    check(llm, PAIRS, found)


def test_one_that_cannot_be_scored_gives_its_error_and_the_others_run(llm, monkeypatch) -> None:
    call, wrong = (
        scoring.catch_up,
        [("", None), ("a", ""), ([5], None), ("the " * 300, None), ([5, 5, 5, 5], None)],
    )

    def fails(engine, holdings, *args, **rest):
        if any(holding.request.prompt_ids == [5, 5, 5, 5] for holding in holdings):
            raise RuntimeError("the device is on fire")
        return call(engine, holdings, *args, **rest)

    monkeypatch.setattr(scoring, "catch_up", fails)
    found = dict(llm.score_iter([*PAIRS, *wrong]))
    errors = [type(found[len(PAIRS) + i]) for i in range(len(wrong))]
    assert errors == [jfp8kv.ConfigError] * 3 + [jfp8kv.CapacityError, RuntimeError]
    check(llm, PAIRS, found)


def test_what_the_cache_has_of_a_prompt_is_not_run_again(llm, ran) -> None:
    pairs = [("I said no to the", f" {word}") for word in ("end", "sea")]
    (first,) = dict(llm.score_iter(pairs[:1])).values()
    ran.clear()
    found = dict(llm.score_iter(pairs))
    assert found[0].logprobs == pytest.approx(first.logprobs, abs=1e-5)
    assert sum(map(sum, ran)) <= 2 * 8, "of either text no more than what is in its last page"
    check(llm, pairs, found)
