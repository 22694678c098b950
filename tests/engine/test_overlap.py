"""Host work overlaps with device steps.

No tokens are lost or duplicated by the one-step lag between host and device, and a step that fails
on the device fails the requests that were in it.
"""

from typing import Any

import numpy as np
import pytest

import jfp8kv
from jfp8kv.engine import postprocess
from jfp8kv.engine.batch import StepOutput
from jfp8kv.engine.postprocess import NewTokens
from jfp8kv.engine.scheduler import ScheduledDecode, SchedulerOutput
from jfp8kv.engine.step import PromptLogprobs
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
LONG = {"max_tokens": 60, "temperature": 1.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER, dtype="float32")


@pytest.fixture
def llm(params) -> jfp8kv.LLM:
    return jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **SIZES)


def test_output_is_emitted_while_the_next_step_runs(llm, monkeypatch) -> None:
    engine = llm.engine
    seen: list[tuple[int, list[type]]] = []  # output tokens, and the plans in flight
    emit = postprocess.emit_output

    def recorded(new: NewTokens, *rest: Any) -> None:
        plans = [type(in_flight.plan) for in_flight in engine.results.in_flight]
        seen.append((len(new.request.output_ids), plans))
        emit(new, *rest)

    monkeypatch.setattr(postprocess, "emit_output", recorded)
    llm.generate([[5, 6, 7]], **LONG)
    assert len(seen) > 6
    for tokens, plans in seen:
        assert plans == ([ScheduledDecode] if tokens < 60 else [])


def test_prompts_are_prefilled_beside_a_decode_at_most_one_step_ahead(llm, monkeypatch) -> None:
    engine = llm.engine
    steps: list[SchedulerOutput] = []
    ahead: list[int] = []
    dispatch = engine._dispatch

    def recorded(scheduled: SchedulerOutput) -> None:
        ahead.append(len({in_flight.number for in_flight in engine.results.in_flight}))
        steps.append(scheduled)
        dispatch(scheduled)

    stream = llm.stream("hello", seed=1, **LONG)
    text = next(stream)
    monkeypatch.setattr(engine, "_dispatch", recorded)
    greedy = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    outs = llm.generate([[9] * 120, [8] * 100], **greedy)
    prefills = [step for step in steps if step.prefill]
    assert len(prefills) > 3
    assert all(step.decode and step.decode.steps <= 2 for step in prefills)
    assert max(ahead) == 1
    monkeypatch.undo()
    assert text + "".join(stream) == llm.generate("hello", seed=1, **LONG)[0].text
    alone = [llm.generate([p], **greedy)[0].token_ids for p in ([9] * 120, [8] * 100)]
    assert [out.token_ids for out in outs] == alone


def test_tokens_past_a_stop_string_are_dropped_and_not_counted(llm) -> None:
    seeds = range(6)
    texts = [llm.generate("hello", seed=seed, **LONG)[0].text for seed in seeds]
    stops = [text[10 + 3 * seed : 13 + 3 * seed] for seed, text in zip(seeds, texts, strict=True)]
    before = llm.stats.generated_tokens
    sampling = [
        jfp8kv.SamplingParams(seed=seed, stop=stop, logprobs=2, **LONG)
        for seed, stop in zip(seeds, stops, strict=True)
    ]
    outs = [out.outputs[0] for out in llm.generate(["hello"] * len(seeds), sampling)]
    for out, text, stop in zip(outs, texts, stops, strict=True):
        assert out.text == text[: text.index(stop)]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
        assert len(out.logprobs) == len(out.token_ids) < 60
    generated = llm.stats.generated_tokens - before
    assert generated == sum(len(out.token_ids) for out in outs)
    assert used_pages(llm) == 0
    again = llm.generate("hello", seed=0, **LONG)[0]
    assert again.text == texts[0], "the steps in flight wrote to no other sequence's pages"


def test_closing_a_stream_with_a_step_in_flight_does_not_disturb_others(llm) -> None:
    want = llm.generate("hello", seed=7, **LONG)[0].text
    streams = [llm.stream("hello", seed=seed, **LONG) for seed in (7, 8, 9)]
    pieces = [next(stream) for stream in streams]
    used = used_pages(llm)
    streams[1].close()
    assert used_pages(llm) < used
    streams[2].close()
    assert pieces[0] + "".join(streams[0]) == want and used_pages(llm) == 0


def penalized(row: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
    """Return logits with the penalties of the test below applied."""
    in_output = np.bincount(output, minlength=len(row))
    seen = (in_output > 0) | (np.bincount(prompt, minlength=len(row)) > 0)
    row = np.where(seen, np.where(row > 0, row / 1.3, row * 1.3), row)
    return row - 0.4 * (in_output > 0) - 0.2 * in_output


def test_penalties_count_every_token_of_a_long_output(params) -> None:
    """The counts on the device are refreshed now and then, beside requests of other lengths."""
    llm = jfp8kv.LLM(params, kv_dtype="float32", **SIZES | {"kv_cache_memory": "1MB"})
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    sampling = {"temperature": 0.0, "ignore_eos": True, **penalties}
    prompts, lengths = [[5, 6, 7, 7], [40] * 9], [110, 90]
    outs = llm.generate(
        prompts, [jfp8kv.SamplingParams(max_tokens=length, **sampling) for length in lengths]
    )
    for prompt, out, length in zip(prompts, outs, lengths, strict=True):
        output = out.token_ids
        logits = llm.logits(prompt + output[:-1])[len(prompt) - 1 :].astype(np.float64)
        for position, (row, token) in enumerate(zip(logits, output, strict=True)):
            row = penalized(row, prompt, output[:position])
            assert row[token] >= row.max() - 1e-4
        assert len(output) == length


def test_other_requests_advance_between_the_chunks_of_a_scored_sequence(llm) -> None:
    ids = [5] * 120
    want = llm.logits(ids)
    stream = llm.stream("hello", seed=7, **LONG)
    text = next(stream)
    before = llm.stats.decode_steps
    got = llm.logits(ids)
    assert llm.stats.decode_steps - before >= 2, "the stream's request decodes beside the prefill"
    text += "".join(stream)
    assert text == llm.generate("hello", seed=7, **LONG)[0].text
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert used_pages(llm) == 0


class Lost:
    """The array of a computation that failed."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("the device is gone")

    def block_until_ready(self) -> None:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("failing", ["prefill", "decode"])
def test_a_failure_on_the_device_is_raised_when_its_results_are_needed(
    llm, monkeypatch, failing
) -> None:
    engine, prompts = llm.engine, [[5] * 90, [6] * 3]
    want = [out.token_ids for out in llm.generate(prompts, seed=1, **LONG)]
    stream = llm.stream("hello", seed=2, **LONG)
    next(stream)
    call, calls = engine.programs.call, []

    def losing(function: Any, *args: Any, **kwargs: Any) -> Any:
        output, pages = call(function, *args, **kwargs)
        calls.append(function.__name__)
        if calls.count(failing) != 2 or function.__name__ != failing:
            return output, pages
        if failing == "prefill":
            lost = object.__new__(PromptLogprobs)
            lost.__dict__.update(logprobs=Lost(), top=Lost())
        else:
            lost = object.__new__(StepOutput)
            lost.__dict__.update(tokens=Lost(), logprobs=Lost(), top=None, drafts=None)
        return lost, pages

    monkeypatch.setattr(engine.programs, "call", losing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate([[4] * 120, [7] * 3], seed=1, **LONG)  # not in the prefix cache
    monkeypatch.undo()
    with pytest.raises(jfp8kv.Jfp8kvError, match="a step failed: RuntimeError: the device is gone"):
        list(stream)
    assert used_pages(llm) == 0 and not engine.results.in_flight
    assert [out.token_ids for out in llm.generate(prompts, seed=1, **LONG)] == want


def test_a_failed_dispatch_does_not_lose_requests_that_had_finished(llm, monkeypatch) -> None:
    """The last tokens of a request have been committed when the next dispatch fails."""
    engine = llm.engine
    want = llm.generate("hello", seed=2, **LONG | {"max_tokens": 4})[0].text
    short = llm.stream("hello", seed=2, **LONG | {"max_tokens": 4})
    long = llm.stream("hello", seed=2, **LONG)
    text = next(short)
    next(long)
    dispatch = engine._dispatch

    def failing(scheduled: SchedulerOutput) -> None:
        if len(scheduled.decode.requests) == 1:
            raise ZeroDivisionError
        dispatch(scheduled)

    monkeypatch.setattr(engine, "_dispatch", failing)
    with pytest.raises(jfp8kv.Jfp8kvError, match="ZeroDivisionError"):
        list(long)
    monkeypatch.undo()
    assert text + "".join(short) == want and used_pages(llm) == 0


def test_forks_and_streams_in_a_pool_too_small_for_all_read_only_their_own_pages(params) -> None:
    """Page copies, preemptions and stop strings found one step late, with steps in flight."""
    small = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **SIZES | {"kv_cache_memory": "8KiB"})
    large = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", prefix_caching=False, **SIZES)
    prompt, sampling = "hello hello", LONG | {"max_tokens": 30}
    texts = [large.generate(prompt, seed=seed, **sampling)[0].text for seed in range(4)]
    stops = [text[6 + 2 * seed : 9 + 2 * seed] for seed, text in enumerate(texts)]
    ids = small.tokenizer.encode(prompt)
    with small.session(ids) as stem:
        streams = [
            small.stream(prompt, seed=seed, stop=stop, **sampling)
            for seed, stop in enumerate(stops)
        ]
        pieces: list[list[str]] = [[] for _ in streams]
        for number in range(6):
            for stream, piece in zip(streams, pieces, strict=True):
                piece.append(next(stream, ""))
            with stem.fork() as branch:
                branch.extend([7 + number])
                got = jfp8kv.extend_batch([stem, branch], [5, 6])
                alone = ([*ids, 5], [*ids, 7 + number, 6])
                want = [large.logits(sequence)[-1] for sequence in alone]
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
            stem.rollback(1)
        got_texts = [
            "".join(piece) + "".join(stream) for stream, piece in zip(streams, pieces, strict=True)
        ]
        truncated = [text[: text.index(stop)] for text, stop in zip(texts, stops, strict=True)]
        assert got_texts == truncated
    assert small.stats.preemptions > 0 and used_pages(small) == 0
