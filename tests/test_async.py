"""`llm.astream`: the text of `stream`, for event loops that have more to do."""

import asyncio
import threading
import time

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
    return jfp8kv.LLM(
        jfp8kv.load(REFERENCES[0], dtype="float32"), kv_dtype="fp8_e4m3", **SIZES
    )


async def text(llm: jfp8kv.LLM, prompt: str, seed: int) -> str:
    return "".join([piece async for piece in llm.astream(prompt, SAMPLING, seed=seed)])


async def freed(llm: jfp8kv.LLM) -> bool:
    """Whether all pages come back, the running step's end at the latest."""
    for _ in range(3000):
        if used_pages(llm) == 0:
            return True
        await asyncio.sleep(0.001)
    return False


def test_the_pieces_are_those_of_the_text(llm) -> None:
    async def main() -> list[str]:
        return [piece async for piece in llm.astream("hello", SAMPLING)]

    pieces = asyncio.run(main())
    assert "".join(pieces) == llm.generate("hello", SAMPLING)[0].text and len(pieces) > 1


def test_many_streams_and_a_generate_in_a_thread_run_together(llm) -> None:
    prompts = ["abc", "hello", "x", "b" * 30, "ab"]
    want = [llm.generate(prompt, SAMPLING, seed=i)[0].text for i, prompt in enumerate(prompts)]
    before = llm.stats.decode_steps

    async def main() -> tuple[list[str], str]:
        streams = asyncio.gather(*(text(llm, prompt, i) for i, prompt in enumerate(prompts[:4])))
        called = asyncio.to_thread(llm.generate, prompts[4], SAMPLING, seed=4)
        made, out = await asyncio.gather(streams, called)
        return [*made, out[0].text]

    assert asyncio.run(main()) == want
    assert llm.stats.decode_steps - before < 4 * 40, (
        "one after another they would take five times forty"
    )


def test_the_event_loop_never_waits_for_a_step(llm, monkeypatch) -> None:
    """Steps that wait for the loop to come round would wait for ever if the loop waited for them."""
    real, came_round = llm._engine.step, threading.Event()

    def step() -> None:
        came_round.clear()
        assert came_round.wait(20)
        real()

    monkeypatch.setattr(llm._engine, "step", step)

    async def tick() -> None:
        while True:
            came_round.set()
            await asyncio.sleep(0.001)

    async def main() -> str:
        ticking = asyncio.create_task(tick())
        try:
            return await text(llm, "hello", 2)
        finally:
            ticking.cancel()

    assert asyncio.run(main())
    assert threading.current_thread() is threading.main_thread()


def test_leaving_the_loop_frees_the_pages(llm) -> None:
    async def main() -> None:
        async for _ in llm.astream("hello", SAMPLING):
            assert used_pages(llm) > 0
            break
        assert await freed(llm)
        stream = llm.astream("hello", SAMPLING)
        await anext(stream)
        await stream.aclose()
        assert used_pages(llm) == 0

    asyncio.run(main())


def test_cancelling_the_task_frees_the_pages_when_the_step_ends(llm, monkeypatch) -> None:
    real, inside, go_on = llm._engine.step, threading.Event(), threading.Event()

    def step() -> None:
        if used_pages(llm):
            inside.set()
            assert go_on.wait(20)
        real()

    monkeypatch.setattr(llm._engine, "step", step)

    async def main() -> None:
        task = asyncio.create_task(text(llm, "hello", 1))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        began = time.perf_counter()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.perf_counter() - began < 10 and used_pages(llm) > 0, (
            "it did not wait for the step"
        )
        go_on.set()
        assert await freed(llm)

    asyncio.run(main())
    assert llm.generate("hello", SAMPLING)[0].text


def test_a_failed_step_is_told_to_every_stream_and_the_next_is_served(llm, monkeypatch) -> None:
    want = llm.generate("hello", SAMPLING)[0].text

    async def main() -> list:
        with monkeypatch.context() as broken:
            real, steps = llm._engine.step, []

            def step() -> None:
                steps.append(1)
                if len(steps) > 3:
                    raise RuntimeError("the device is gone")
                real()

            broken.setattr(llm._engine, "step", step)
            results = await asyncio.gather(
                *(text(llm, "hello", i) for i in range(3)), return_exceptions=True
            )
        return [*results, await text(llm, "hello", 2)]

    *failed, last = asyncio.run(main())
    assert all(
        isinstance(error, StepError) and "the device is gone" in str(error) for error in failed
    )
    assert last == want and used_pages(llm) == 0


@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"best_of": 2}, {"prompt_logprobs": 1}, {"temprature": 1}, {"top_p": 7}]
)
def test_a_mistake_is_named_by_the_call_itself(llm, fields) -> None:
    with pytest.raises(ConfigError):
        llm.astream("hello", **fields)
