"""The host works as the device runs: what it learns late is neither lost nor repeated, what fails late fails in its place."""

from typing import Any

import numpy as np
import pytest

import jfp8kv
from jfp8kv.engine import postprocess
from jfp8kv.engine.batch import StepOutput
from jfp8kv.engine.scheduler import SchedulerOutput
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


def test_texts_are_made_while_the_next_turn_runs(llm, monkeypatch) -> None:
    engine, flying = llm._engine, []
    tell = postprocess.emit_output

    def watched(made: Any, *rest: Any) -> None:
        flying.append(
            (
                len(made.request.output_ids),
                [type(flight.plan).__name__ for flight in engine._flying],
            )
        )
        tell(made, *rest)

    monkeypatch.setattr(postprocess, "emit_output", watched)
    llm.generate([[5, 6, 7]], **LONG)
    assert len(flying) > 6
    assert all(plans == (["ScheduledDecode"] if made < 60 else []) for made, plans in flying)


def test_prompts_are_run_beside_a_decode_and_the_host_is_a_turn_ahead_at_most(
    llm, monkeypatch
) -> None:
    engine, turns, ahead = llm._engine, [], []
    dispatch = engine._dispatch

    def watched(turn: SchedulerOutput | None) -> None:
        ahead.append(len({flight.turn for flight in engine._flying}))
        turns.append(turn)
        dispatch(turn)

    stream = llm.stream("hello", seed=1, **LONG)
    begun = next(stream)
    monkeypatch.setattr(engine, "_dispatch", watched)
    want = llm.generate([[9] * 120, [8] * 100], max_tokens=4, temperature=0.0, ignore_eos=True)
    both = [turn for turn in turns if turn and turn.prefill]
    assert len(both) > 3 and all(turn.decode and turn.decode.steps <= 2 for turn in both)
    assert max(ahead) == 1
    monkeypatch.undo()
    assert begun + "".join(stream) == llm.generate("hello", seed=1, **LONG)[0].text
    alone = [
        llm.generate([p], max_tokens=4, temperature=0.0, ignore_eos=True)[0].token_ids
        for p in ([9] * 120, [8] * 100)
    ]
    assert [out.token_ids for out in want] == alone


def test_what_was_made_past_a_stop_string_is_dropped_and_not_counted(llm) -> None:
    seeds = range(6)
    whole = [llm.generate("hello", seed=seed, **LONG)[0].text for seed in seeds]
    stops = [text[10 + 3 * seed : 13 + 3 * seed] for seed, text in zip(seeds, whole, strict=True)]
    before = llm.stats.generated_tokens
    sampling = [
        jfp8kv.SamplingParams(seed=seed, stop=stop, logprobs=2, **LONG)
        for seed, stop in zip(seeds, stops, strict=True)
    ]
    outs = [out.outputs[0] for out in llm.generate(["hello"] * len(seeds), sampling)]
    for out, text, stop in zip(outs, whole, stops, strict=True):
        assert out.text == text[: text.index(stop)] and (out.finish_reason, out.stop_reason) == (
            "stop",
            stop,
        )
        assert len(out.logprobs) == len(out.token_ids) < 60
    assert llm.stats.generated_tokens - before == sum(len(out.token_ids) for out in outs)
    assert used_pages(llm) == 0
    again = llm.generate("hello", seed=0, **LONG)[0]
    assert again.text == whole[0], "what was still on the device has reached nobody's pages"


def test_a_stream_that_is_closed_while_its_tokens_are_made_disturbs_nobody(llm) -> None:
    want = llm.generate("hello", seed=7, **LONG)[0].text
    streams = [llm.stream("hello", seed=seed, **LONG) for seed in (7, 8, 9)]
    pieces = [next(stream) for stream in streams]
    held = used_pages(llm)
    streams[1].close()
    assert used_pages(llm) < held
    streams[2].close()
    assert pieces[0] + "".join(streams[0]) == want and used_pages(llm) == 0


def test_penalties_count_every_token_of_a_long_text_whoever_decodes_beside_it(params) -> None:
    llm = jfp8kv.LLM(params, kv_dtype="float32", **SIZES | {"kv_cache_memory": "1MB"})
    fields = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    sampling = {"temperature": 0.0, "ignore_eos": True, **fields}
    prompts, lengths = [[5, 6, 7, 7], [40] * 9], [110, 90]
    outs = llm.generate(
        prompts, [jfp8kv.SamplingParams(max_tokens=length, **sampling) for length in lengths]
    )
    for prompt, out, length in zip(prompts, outs, lengths, strict=True):
        made = out.token_ids
        logits = llm.logits(prompt + made[:-1])[len(prompt) - 1 :].astype(np.float64)
        for place, (row, token) in enumerate(zip(logits, made, strict=True)):
            there = np.bincount(made[:place], minlength=len(row))
            seen = (there > 0) | (np.bincount(prompt, minlength=len(row)) > 0)
            row = (
                np.where(seen, np.where(row > 0, row / 1.3, row * 1.3), row)
                - 0.4 * (there > 0)
                - 0.2 * there
            )
            assert row[token] >= row.max() - 1e-4
        assert len(made) == length


def test_others_get_on_between_the_chunks_of_a_text_that_is_scored(llm) -> None:
    ids, found, pieces = [5] * 120, [], []
    want = llm.logits(ids)
    stream = llm.stream("hello", seed=7, **LONG)
    pieces.append(next(stream))

    def look(logits: np.ndarray) -> None:
        found.append(logits)
        pieces.append(next(stream))

    llm._run_text(ids, look, what="text")
    assert (
        len(found) == 3
        and "".join(pieces) + "".join(stream) == llm.generate("hello", seed=7, **LONG)[0].text
    )
    np.testing.assert_allclose(np.concatenate(found), want, rtol=0, atol=2e-5)
    assert used_pages(llm) == 0


class Lost:
    """An array of a computation that failed."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("the device is gone")

    def block_until_ready(self) -> None:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_failure_on_the_device_is_raised_when_its_results_are_needed(
    llm, monkeypatch, step
) -> None:
    engine, prompts = llm._engine, [[5] * 90, [6] * 3]
    want = [out.token_ids for out in llm.generate(prompts, seed=1, **LONG)]
    stream = llm.stream("hello", seed=2, **LONG)
    next(stream)
    call, calls = engine.programs.call, []

    def losing(function: Any, *args: Any, **kwargs: Any) -> Any:
        output, pages = call(function, *args, **kwargs)
        calls.append(function.__name__)
        if calls.count(step) != 2 or function.__name__ != step:
            return output, pages
        if step == "prefill":
            return Lost(), pages
        lost = object.__new__(StepOutput)
        lost.__dict__.update(tokens=Lost(), logprobs=Lost(), top=None, drafts=None)
        return lost, pages

    monkeypatch.setattr(engine.programs, "call", losing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate([[4] * 120, [7] * 3], seed=1, **LONG)  # nothing of which is in the cache
    monkeypatch.undo()
    with pytest.raises(jfp8kv.Jfp8kvError, match="a step failed: RuntimeError: the device is gone"):
        list(stream)
    assert used_pages(llm) == 0 and not engine._flying
    assert [out.token_ids for out in llm.generate(prompts, seed=1, **LONG)] == want


def test_a_dispatch_that_fails_takes_no_finished_text_along(llm, monkeypatch) -> None:
    """The tokens of one turn are there when the next cannot be dispatched: whom they end gets them."""
    engine = llm._engine
    want = llm.generate("hello", seed=2, **LONG | {"max_tokens": 4})[0].text
    short, long = (
        llm.stream("hello", seed=2, **LONG | {"max_tokens": tokens}) for tokens in (4, 60)
    )
    text = next(short)
    next(long)
    last = engine._dispatch
    monkeypatch.setattr(
        engine, "_dispatch", lambda turn: last(turn) if len(turn.decode.requests) > 1 else 1 / 0
    )
    with pytest.raises(jfp8kv.Jfp8kvError, match="ZeroDivisionError"):
        list(long)
    monkeypatch.undo()
    assert text + "".join(short) == want and used_pages(llm) == 0


def test_texts_branch_beside_streams_in_a_pool_too_small_for_all_and_nobody_reads_what_is_anothers(
    params,
) -> None:
    """Copies, preemptions and stop strings that are found late, while turns are on the device."""
    tight = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **SIZES | {"kv_cache_memory": "8KiB"})
    apart = jfp8kv.LLM(params, kv_dtype="fp8_e4m3", prefix_caching=False, **SIZES)
    prompt, sampling = "hello hello", LONG | {"max_tokens": 30}
    wholes = [apart.generate(prompt, seed=seed, **sampling)[0].text for seed in range(4)]
    stops = [text[6 + 2 * seed : 9 + 2 * seed] for seed, text in enumerate(wholes)]
    ids = tight.tokenizer.encode(prompt)
    with tight.session(ids) as stem:
        streams = [
            tight.stream(prompt, seed=seed, stop=stop, **sampling)
            for seed, stop in enumerate(stops)
        ]
        pieces: list[list[str]] = [[] for _ in streams]
        for turn in range(6):
            for stream, made in zip(streams, pieces, strict=True):
                made.append(next(stream, ""))
            with stem.fork() as branch:
                branch.extend([7 + turn])
                got = jfp8kv.extend_batch([stem, branch], [5, 6])
                want = [apart.logits([*ids, 5])[-1], apart.logits([*ids, 7 + turn, 6])[-1]]
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
            stem.rollback(1)
        texts = [
            "".join(made) + "".join(stream) for stream, made in zip(streams, pieces, strict=True)
        ]
        assert texts == [text[: text.index(stop)] for text, stop in zip(wholes, stops, strict=True)]
    assert tight.stats.preemptions > 0 and used_pages(tight) == 0
