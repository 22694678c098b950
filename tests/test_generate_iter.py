"""`LLM.generate_iter`: the outputs of `generate`, for an iterator that is read as there is room."""

import itertools
from typing import Any

import pytest

import jfp8kv
from jfp8kv import CapacityError, ConfigError, SamplingParams
from jfp8kv.engine.programs import Programs
from tests.engines import used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile
FOLDER = REFERENCES[0].parent / "llama_bf16"
PROMPTS = ["the end", "hello", "once upon a time there was", "a", "no"] * 3


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return jfp8kv.LLM(
        jfp8kv.load(FOLDER, dtype="float32"),
        kv_dtype="float32",
        max_num_batched_tokens=64,
        max_num_seqs=2,
        kv_cache_memory="1MB",
    )


def requests(**fields: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (prompt, {"max_tokens": 1 + 3 * (i % 5), "seed": i, "ignore_eos": True} | fields)
        for i, prompt in enumerate(PROMPTS)
    ]


def test_results_are_those_of_generate_in_any_batch(llm) -> None:
    fields = {"n": 2, "prompt_logprobs": 1}
    found = dict(llm.generate_iter(requests(**fields)))
    assert sorted(found) == list(range(len(PROMPTS)))
    for number, (prompt, params) in enumerate(requests(**fields)):
        (want,) = llm.generate([prompt], SamplingParams(**params))
        assert found[number].prompt_logprobs == want.prompt_logprobs is not None
        got = [output.token_ids for output in found[number].outputs]
        assert got == [output.token_ids for output in want.outputs]


def test_requests_are_taken_as_there_is_room_and_yielded_as_they_finish(llm) -> None:
    taken = itertools.count()

    def endless():
        for number in taken:
            yield "hello", SamplingParams(max_tokens=1 if number else 40, ignore_eos=True)

    results = llm.generate_iter(endless())
    first = [next(results)[0] for _ in range(8)]
    assert 0 not in first, "short requests do not wait for the longest"
    assert next(taken) <= 8 + 2 * 2
    results.close()
    assert llm.stats.kv_tokens_used == 0


def test_an_invalid_request_yields_its_error_and_the_others_run(llm) -> None:
    wrong = [
        ("", {}),
        ("hello", {"temperature": -1.0}),
        ([5] * 4000, {}),
        ("hello", {"temprature": 1.0}),
    ]
    found = dict(llm.generate_iter([*wrong, ("hello", {"max_tokens": 2})]))
    kinds = [type(found[i]) for i in range(4)]
    assert kinds == [ConfigError, ConfigError, CapacityError, ConfigError]
    assert len(found[4].token_ids) == 2


def test_an_error_that_is_not_about_a_request_is_raised_and_cancels_the_others(llm) -> None:
    class Odd:
        def __array__(self):
            raise RuntimeError("a bug of the caller")

    results = llm.generate_iter([("hello", {"max_tokens": 40}), (Odd(), {})])
    with pytest.raises(RuntimeError, match="a bug of the caller"):
        list(results)
    assert used_pages(llm) == 0


def test_a_failed_step_yields_its_error_for_all_requests_in_it(llm, monkeypatch) -> None:
    call, fail = Programs.call, iter([False, False, True])

    def failing(self, *args, **kwargs):
        if next(fail, False):
            raise RuntimeError("the device is on fire")
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Programs, "call", failing)
    found = dict(llm.generate_iter(requests()))
    lost = [number for number, result in found.items() if isinstance(result, Exception)]
    assert sorted(found) == list(range(len(PROMPTS))) and 0 < len(lost) <= 4
    assert all("the device is on fire" in str(found[number]) for number in lost)


def test_a_request_that_finished_before_the_step_failed_is_complete(llm, monkeypatch) -> None:
    """The last tokens of one request are there when the next step of the other cannot start."""
    dispatch = llm.engine._dispatch

    def failing(scheduled):
        if scheduled and scheduled.decode and len(scheduled.decode.requests) == 1:
            raise RuntimeError("the device is on fire")
        dispatch(scheduled)

    monkeypatch.setattr(llm.engine, "_dispatch", failing)
    both = [("hello", {"max_tokens": tokens, "ignore_eos": True}) for tokens in (2, 40)]
    found = dict(llm.generate_iter(both))
    assert len(found[0].token_ids) == 2 and "the device is on fire" in str(found[1])


def test_an_iterator_that_raises_ends_the_results_and_leaves_nothing_behind(llm) -> None:
    def broken():
        yield "hello", {"max_tokens": 30}
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(llm.generate_iter(broken()))
    assert used_pages(llm) == 0 and llm.stats.kv_tokens_used == 0
    assert llm.generate("hello", max_tokens=2)
