"""What goes wrong in a step: everybody is told in a sentence, nothing is held on to, and the next call is served."""

import signal
import threading
import time
from typing import Any

import jax
import pytest

import jfp8kv
from jfp8kv import DeviceMemoryError, Jfp8kvError, StepError
from jfp8kv.cache import config
from tests.engines import used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SIZES = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "page_size": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": "200kB",
}
SAMPLING = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "ignore_eos": True}
PROMPTS = ["abc", "hello you", "b" * 60, "x", "ab"]


def full() -> jax.errors.JaxRuntimeError:
    """What XLA raises when a device has no room left."""
    return jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.\nand pages more of it"
    )


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), kv_dtype="fp8_e4m3", **SIZES)


@pytest.fixture(scope="module")
def want(llm) -> list[str]:
    return [out.text for out in llm.generate(PROMPTS, **SAMPLING)]


def no_room(monkeypatch) -> None:
    """Let no pool be made."""
    real = config.new_pages

    def new_pages(*args, **kwargs):
        pool = real(*args, **kwargs)
        if not isinstance(
            pool.k_bits, jax.core.Tracer
        ):  # whose shape alone is asked for takes no room
            raise full()
        return pool

    monkeypatch.setattr(config, "new_pages", new_pages)


def fail(
    monkeypatch, llm: jfp8kv.LLM, error: BaseException, *, at: int = 3, donated: bool = True
) -> list[int]:
    """Let the `at`th step raise `error`, having taken the pool with it or not."""
    real, calls = llm._engine.programs.call, []

    def call(step, batch, pages, **static):
        calls.append(1)
        if len(calls) != at:
            return real(step, batch, pages, **static)
        if donated:
            real(step, batch, pages, **static)
        raise error

    monkeypatch.setattr(llm._engine.programs, "call", call)
    return calls


@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (
            ValueError("odd shapes"),
            StepError,
            "a step failed: ValueError: odd shapes. All requests were dropped",
        ),
        (
            full(),
            DeviceMemoryError,
            "Out of memory allocating 4294967296 bytes.*smaller kv_cache_memory, max_num_batched_tokens",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_step_that_fails_is_told_in_a_sentence_and_the_next_call_is_served(
    llm, want, monkeypatch, error, raised, says, donated
) -> None:
    def generate() -> list[str]:
        return [out.text for out in llm.generate(PROMPTS, **SAMPLING)]

    for call in (
        generate,
        lambda: list(llm.stream("abc", **SAMPLING)),
        lambda: llm.score("b" * 99),
        lambda: llm.session("abc"),
    ):
        with monkeypatch.context() as broken:
            fail(broken, llm, error, at=1 if call is not generate else 3, donated=donated)
            with pytest.raises(raised, match=says) as told:
                call()
        assert "\n" not in str(told.value) and used_pages(llm) == 0 and llm.stats.kv_bytes_used == 0
    assert generate() == want and used_pages(llm) == 0


@pytest.mark.parametrize("error", [ValueError("odd shapes"), full(), KeyboardInterrupt()])
def test_those_who_share_the_step_are_told_too(llm, want, monkeypatch, error) -> None:
    stream = llm.stream("abc", **SAMPLING | {"max_tokens": 60})
    next(stream)
    with llm.session("hello") as session:
        with monkeypatch.context() as broken:
            fail(broken, llm, error)
            with pytest.raises((Jfp8kvError, KeyboardInterrupt)):
                llm.generate(PROMPTS, **SAMPLING)
        with pytest.raises(
            DeviceMemoryError if isinstance(error, jax.errors.JaxRuntimeError) else StepError,
            match="All requests were dropped",
        ):
            list(stream)
        before = len(session)
        assert session.extend("a").shape[0] == len(session) - before > 0
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want and used_pages(llm) == 0


def test_a_pool_that_finds_no_room_is_refused_with_what_was_asked_and_what_to_try(
    llm, monkeypatch
) -> None:
    no_room(monkeypatch)
    with pytest.raises(
        DeviceMemoryError,
        match=r"KV cache of \d+ bytes found no room.*bytes are free.*smaller kv_cache_memory",
    ):
        jfp8kv.LLM(llm.params, kv_dtype="fp8_e4m3", **SIZES)


def test_a_pool_that_was_lost_is_made_again_as_soon_as_there_is_room(
    llm, want, monkeypatch
) -> None:
    with monkeypatch.context() as broken:
        fail(broken, llm, full())
        no_room(broken)
        for _ in range(2):
            with pytest.raises(DeviceMemoryError):
                llm.generate(PROMPTS, **SAMPLING)
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want


def test_ctrl_c_at_any_moment_leaves_an_engine_that_works(llm, want) -> None:
    """A timer raises where it happens to: in plans, in steps, between them, and while things are put away."""

    def interrupt(*_):
        raise KeyboardInterrupt

    def call(i: int) -> None:
        llm.generate(PROMPTS, **SAMPLING) if i % 2 else list(
            llm.stream("b" * 60, **SAMPLING | {"max_tokens": 60})
        )

    whole, interrupted = [1.0, 1.0], 0  # seconds of each call, as far as they were seen to end
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(30):
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, whole[i % 2] * (0.5 + i) / 30)
            try:
                call(i)
                whole[i % 2] = min(whole[i % 2], time.perf_counter() - began)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert llm.generate("x", **SAMPLING)[0].text == want[3] and used_pages(llm) == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 4
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want


def test_a_thread_that_waits_is_told_when_another_is_interrupted(llm, want, monkeypatch) -> None:
    heard: list[BaseException] = []
    inside = threading.Event()

    def other() -> None:
        try:
            for piece in llm.stream("abc", **SAMPLING | {"max_tokens": 100}):
                inside.set()
                time.sleep(0.001 * len(piece))
        except BaseException as error:
            heard.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    real, scheduler = llm._engine.programs.call, llm._engine.scheduler

    def call(*args: Any, **static: Any) -> Any:
        if len(scheduler.running) > 1:  # both callers' requests are in
            raise KeyboardInterrupt
        return real(*args, **static)

    with monkeypatch.context() as broken:
        broken.setattr(llm._engine.programs, "call", call)
        with pytest.raises((KeyboardInterrupt, StepError)):
            llm.generate(PROMPTS, **SAMPLING | {"max_tokens": 100})
        thread.join(30)
    assert not thread.is_alive() and isinstance(heard[0], (StepError, KeyboardInterrupt))
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want and used_pages(llm) == 0
