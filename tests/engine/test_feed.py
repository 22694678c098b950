"""`LLM.generate_iter`: the texts of `generate`, from an iterator that is taken only as far as the engine has room."""

import itertools

import pytest

import jfp8kv
from jfp8kv import ConfigError, SamplingParams
from jfp8kv.engine.programs import Programs
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile
FOLDER = REFERENCES[0].parent / "llama_bf16"
PROMPTS = ["the end", "hello", "once upon a time there was", "a", "no"] * 3


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    params = jfp8kv.load(FOLDER, dtype="float32")
    return jfp8kv.LLM(
        params,
        kv_dtype="float32",
        max_num_batched_tokens=64,
        max_num_seqs=2,
        kv_cache_memory="1MB",
    )


def asked(**fields):
    return [
        (prompt, {"max_tokens": 1 + 3 * (i % 5), "seed": i, "ignore_eos": True} | fields)
        for i, prompt in enumerate(PROMPTS)
    ]


def test_results_are_those_of_generate_whatever_runs_beside_them(llm) -> None:
    fields = {"n": 2, "prompt_logprobs": 1}
    found = dict(llm.generate_iter(asked(**fields)))
    assert sorted(found) == list(range(len(PROMPTS)))
    for number, (prompt, wished) in enumerate(asked(**fields)):
        (want,) = llm.generate([prompt], SamplingParams(**wished))
        assert found[number].prompt_logprobs == want.prompt_logprobs is not None
        assert [made.token_ids for made in found[number].outputs] == [
            made.token_ids for made in want.outputs
        ]


def test_requests_are_taken_as_there_is_room_and_given_as_they_end(llm) -> None:
    taken = itertools.count()

    def endless():
        for number in taken:
            yield "hello", SamplingParams(max_tokens=1 if number else 40, ignore_eos=True)

    results = llm.generate_iter(endless())
    first = [next(results)[0] for _ in range(8)]
    assert 0 not in first, "nobody waits for the slowest"
    assert next(taken) <= 8 + 2 * 2
    results.close()
    assert llm.stats.kv_tokens_used == 0


def test_a_request_that_cannot_be_served_yields_its_error_and_the_others_run(llm) -> None:
    wrong = [
        ("", {}),
        ("hello", {"temperature": -1.0}),
        ([5] * 4000, {}),
        ("hello", {"temprature": 1.0}),
    ]
    found = dict(llm.generate_iter([*wrong, ("hello", {"max_tokens": 2})]))
    errors = [ConfigError, ConfigError, jfp8kv.CapacityError, ConfigError]
    assert [type(found[i]) for i in range(4)] == errors
    assert len(found[4].token_ids) == 2


def test_an_error_that_is_not_the_librarys_is_raised_and_not_yielded(llm) -> None:
    class Broken:
        def __array__(self):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(llm.generate_iter([("hello", {"max_tokens": 2}), (Broken(), {})]))
    assert llm.stats.kv_tokens_used == 0 and llm.generate("hello", max_tokens=2)


def test_a_step_that_fails_gives_its_error_to_all_that_were_in_it_and_the_next_are_served(
    llm, monkeypatch
) -> None:
    call, left = Programs.call, iter([False, False, True])

    def fails(self, *args, **kwargs):
        if next(left, False):
            raise RuntimeError("the device is on fire")
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Programs, "call", fails)
    found = dict(llm.generate_iter(asked()))
    lost = [number for number, result in found.items() if isinstance(result, Exception)]
    assert sorted(found) == list(range(len(PROMPTS))) and 0 < len(lost) <= 4
    assert all("the device is on fire" in str(found[number]) for number in lost)


def test_what_had_ended_when_a_step_failed_is_whole(llm, monkeypatch) -> None:
    """The last tokens of the one are there when the next step of the other cannot be dispatched."""
    dispatch = llm._engine._dispatch

    def failing(turn):
        if turn and turn.decode and len(turn.decode.requests) == 1:
            raise RuntimeError("the device is on fire")
        dispatch(turn)

    monkeypatch.setattr(llm._engine, "_dispatch", failing)
    found = dict(
        llm.generate_iter(
            [("hello", {"max_tokens": tokens, "ignore_eos": True}) for tokens in (2, 40)]
        )
    )
    assert len(found[0].token_ids) == 2 and "the device is on fire" in str(found[1])


def test_an_iterator_that_fails_ends_it_and_leaves_nothing_behind(llm) -> None:
    def breaks():
        yield "hello", {"max_tokens": 30}
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(llm.generate_iter(breaks()))
    assert llm.stats.kv_tokens_used == 0 and llm.generate("hello", max_tokens=2)
