"""Failed steps: callers get a readable error, all pages are freed, the next call is served."""

import signal
import threading
import time
from typing import Any

import jax
import pytest

import jfp8kv
from jfp8kv import DeviceMemoryError, StepError
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


def out_of_memory() -> jax.errors.JaxRuntimeError:
    """Return what XLA raises when a device has no memory left."""
    return jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.\nand pages more of it"
    )


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), kv_dtype="fp8_e4m3", **SIZES)


@pytest.fixture(scope="module")
def want(llm) -> list[str]:
    return [out.text for out in llm.generate(PROMPTS, **SAMPLING)]


def fail_allocations(monkeypatch) -> None:
    """Let every allocation of a pool fail."""
    real = config.new_pool

    def new_pool(*args: Any, **kwargs: Any) -> Any:
        pool = real(*args, **kwargs)
        if not isinstance(pool.k_bits, jax.core.Tracer):  # `eval_shape` allocates nothing
            raise out_of_memory()
        return pool

    monkeypatch.setattr(config, "new_pool", new_pool)


def fail_step(
    monkeypatch, llm: jfp8kv.LLM, error: BaseException, *, number: int = 3, donated: bool = True
) -> None:
    """Let dispatch `number` raise `error`, with the pool donated before or not."""
    real = llm.engine.programs.call
    calls: list[int] = []

    def call(step: Any, batch: Any, pages: Any, **static: Any) -> Any:
        calls.append(1)
        if len(calls) != number:
            return real(step, batch, pages, **static)
        if donated:
            real(step, batch, pages, **static)
        raise error

    monkeypatch.setattr(llm.engine.programs, "call", call)


@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ValueError("odd shapes"),
            StepError,
            "a step failed: ValueError: odd shapes. In-flight requests were aborted",
        ),
        (
            out_of_memory(),
            DeviceMemoryError,
            "Out of memory allocating 4294967296 bytes.*smaller kv_cache_memory, max_num_batched",
        ),
        (KeyboardInterrupt(), StepError, r"a step was interrupted \(KeyboardInterrupt\)"),
    ],
)
def test_a_failed_step_raises_a_readable_error_and_the_next_call_is_served(
    llm, want, monkeypatch, error, kind, message, donated
) -> None:
    def generate() -> list[str]:
        return [out.text for out in llm.generate(PROMPTS, **SAMPLING)]

    calls = (
        (3, generate),
        (1, lambda: list(llm.stream("abc", **SAMPLING))),
        (1, lambda: llm.score("b" * 99)),
        (1, lambda: llm.session("abc")),
    )
    for number, call in calls:
        with monkeypatch.context() as broken:
            fail_step(broken, llm, error, number=number, donated=donated)
            with pytest.raises(kind, match=message) as raised:
                call()
        assert "\n" not in str(raised.value)
        assert used_pages(llm) == 0 and llm.stats.kv_bytes_used == 0
    assert generate() == want and used_pages(llm) == 0


@pytest.mark.parametrize("error", [ValueError("odd shapes"), out_of_memory(), KeyboardInterrupt()])
def test_all_callers_with_a_request_in_the_failed_step_get_the_error(
    llm, want, monkeypatch, error
) -> None:
    memory = isinstance(error, jax.errors.JaxRuntimeError)
    kind = DeviceMemoryError if memory else StepError
    stream = llm.stream("abc", **SAMPLING | {"max_tokens": 60})
    next(stream)
    with llm.session("hello") as session:
        with monkeypatch.context() as broken:
            fail_step(broken, llm, error)
            with pytest.raises(kind, match="In-flight requests were aborted"):
                llm.generate(PROMPTS, **SAMPLING)
        with pytest.raises(kind, match="In-flight requests were aborted"):
            list(stream)
        before = len(session)
        assert session.extend("a").shape[0] == len(session) - before > 0
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want and used_pages(llm) == 0


def test_a_pool_that_does_not_fit_is_refused_with_its_size_and_a_remedy(llm, monkeypatch) -> None:
    fail_allocations(monkeypatch)
    with pytest.raises(
        DeviceMemoryError,
        match=r"KV cache of \d+ bytes does not fit.*bytes free.*smaller kv_cache_memory",
    ):
        jfp8kv.LLM(llm.params, kv_dtype="fp8_e4m3", **SIZES)


def test_a_lost_pool_is_allocated_again_as_soon_as_it_fits(llm, want, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        fail_step(broken, llm, out_of_memory())
        fail_allocations(broken)
        for _ in range(2):
            with pytest.raises(DeviceMemoryError):
                llm.generate(PROMPTS, **SAMPLING)
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want


def test_an_interrupt_at_any_moment_leaves_a_working_engine(llm, want) -> None:
    """A timer interrupts the caller while it submits, waits, and cleans up."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def call(i: int) -> None:
        if i % 2:
            llm.generate(PROMPTS, **SAMPLING)
        else:
            list(llm.stream("b" * 60, **SAMPLING | {"max_tokens": 60}))

    seconds = [1.0, 1.0]  # of each call that was seen to finish
    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(30):
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, seconds[i % 2] * (0.5 + i) / 30)
            try:
                call(i)
                seconds[i % 2] = min(seconds[i % 2], time.perf_counter() - began)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert llm.generate("x", **SAMPLING)[0].text == want[3] and used_pages(llm) == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 4
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want


def test_a_thread_that_reads_a_stream_gets_the_error_of_another_callers_step(
    llm, want, monkeypatch
) -> None:
    errors: list[BaseException] = []
    reading = threading.Event()

    def read() -> None:
        try:
            for _ in llm.stream("abc", **SAMPLING | {"max_tokens": 100}):
                reading.set()
        except StepError as error:
            errors.append(error)

    real, engine = llm.engine.programs.call, llm.engine

    def call(*args: Any, **static: Any) -> Any:
        if len(engine.scheduler.running) > 1:  # requests of both callers
            raise RuntimeError("the device is gone")
        while reading.is_set() and llm._driver._inbox.empty():
            time.sleep(0.001)  # the stream must not finish before the other caller submits
        return real(*args, **static)

    thread = threading.Thread(target=read)
    with monkeypatch.context() as broken:
        broken.setattr(llm.engine.programs, "call", call)
        thread.start()
        assert reading.wait(30)
        with pytest.raises(StepError, match="the device is gone"):
            llm.generate(PROMPTS, **SAMPLING | {"max_tokens": 100})
        thread.join(30)
    assert not thread.is_alive() and "the device is gone" in str(errors[0])
    assert [out.text for out in llm.generate(PROMPTS, **SAMPLING)] == want and used_pages(llm) == 0
