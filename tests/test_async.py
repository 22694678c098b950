"""`llm.astream`: the text of `stream`, for event loops."""

import asyncio
import threading
import time
from typing import Any

import pytest

import jfp8kv
from jfp8kv import ConfigError, SamplingParams, StepError
from tests.engines import used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SAMPLING = SamplingParams(max_tokens=40, temperature=1.0, seed=2, ignore_eos=True)
SIZES = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "page_size": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": "400kB",
}


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), kv_dtype="fp8_e4m3", **SIZES)


async def text(llm: jfp8kv.LLM, prompt: str, seed: int) -> str:
    return "".join([piece async for piece in llm.astream(prompt, SAMPLING, seed=seed)])


def test_the_pieces_are_those_of_the_text(llm) -> None:
    async def main() -> list[str]:
        return [piece async for piece in llm.astream("hello", SAMPLING)]

    pieces = asyncio.run(main())
    assert "".join(pieces) == llm.generate("hello", SAMPLING)[0].text and len(pieces) > 1


def test_many_streams_and_a_generate_in_a_thread_run_together(llm) -> None:
    prompts = ["abc", "hello", "x", "b" * 30, "ab"]
    want = [llm.generate(prompt, SAMPLING, seed=i)[0].text for i, prompt in enumerate(prompts)]
    before = llm.stats.decode_steps

    async def main() -> list[str]:
        streams = asyncio.gather(*(text(llm, prompt, i) for i, prompt in enumerate(prompts[:4])))
        called = asyncio.to_thread(llm.generate, prompts[4], SAMPLING, seed=4)
        texts, out = await asyncio.gather(streams, called)
        return [*texts, out[0].text]

    assert asyncio.run(main()) == want
    assert llm.stats.decode_steps - before < 4 * 40, "one after another they would take 5 * 40"


def test_the_event_loop_never_waits_for_a_step(llm, monkeypatch) -> None:
    """Each step waits for a tick of the loop: forever, if the loop waited for the step."""
    step, ticked = llm.engine.step, threading.Event()

    def waiting_step() -> None:
        ticked.clear()
        assert ticked.wait(20)
        step()

    monkeypatch.setattr(llm.engine, "step", waiting_step)

    async def tick() -> None:
        while True:
            ticked.set()
            await asyncio.sleep(0)

    async def main() -> str:
        ticking = asyncio.create_task(tick())
        try:
            return await text(llm, "hello", 2)
        finally:
            ticking.cancel()

    assert asyncio.run(main())


def test_leaving_the_loop_or_closing_the_stream_frees_the_pages(llm) -> None:
    async def main() -> None:
        async for _ in llm.astream("hello", SAMPLING):
            assert used_pages(llm) > 0
            break
        for _ in range(3):  # asyncio closes a dropped generator in a task
            await asyncio.sleep(0)
        assert used_pages(llm) == 0
        stream = llm.astream("hello", SAMPLING)
        await anext(stream)
        await stream.aclose()
        assert used_pages(llm) == 0

    asyncio.run(main())


def test_cancelling_the_task_does_not_wait_for_the_step_and_frees_the_pages_after_it(
    llm, monkeypatch
) -> None:
    step, inside, proceed = llm.engine.step, threading.Event(), threading.Event()
    allocator = llm.engine.scheduler.kv_manager.allocator

    def held_step() -> None:
        if allocator.used_pages:
            inside.set()
            assert proceed.wait(20)
        step()

    monkeypatch.setattr(llm.engine, "step", held_step)

    async def main() -> None:
        task = asyncio.create_task(text(llm, "hello", 1))
        await asyncio.to_thread(inside.wait, 20)
        began = time.perf_counter()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.perf_counter() - began < 10 and allocator.used_pages > 0
        proceed.set()
        assert used_pages(llm) == 0

    asyncio.run(main())
    assert llm.generate("hello", SAMPLING)[0].text


def test_every_stream_gets_the_error_of_a_failed_step_and_the_next_is_served(
    llm, monkeypatch
) -> None:
    want = llm.generate("hello", SAMPLING)[0].text

    async def main() -> list[Any]:
        with monkeypatch.context() as broken:
            step, steps = llm.engine.step, []

            def failing_step() -> None:
                steps.append(1)
                if len(steps) > 3:
                    raise RuntimeError("the device is gone")
                step()

            broken.setattr(llm.engine, "step", failing_step)
            streams = [text(llm, "hello", i) for i in range(3)]
            results = await asyncio.gather(*streams, return_exceptions=True)
        return [*results, await text(llm, "hello", 2)]

    *failed, last = asyncio.run(main())
    for error in failed:
        assert isinstance(error, StepError) and "the device is gone" in str(error)
    assert last == want and used_pages(llm) == 0


@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"best_of": 2}, {"prompt_logprobs": 1}, {"temprature": 1}, {"top_p": 7}]
)
def test_an_invalid_option_is_raised_by_the_call_itself(llm, fields) -> None:
    with pytest.raises(ConfigError):
        llm.astream("hello", **fields)


def test_a_stream_refuses_several_prompts(llm) -> None:
    with pytest.raises(ConfigError, match="a stream takes one prompt"):
        llm.astream(["hello", "goodbye"])
