"""The engine thread and its callers, with a fake engine whose steps are counted."""

import asyncio
import contextlib
import gc
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jfp8kv.core.errors import CapacityError, ConfigError, DeviceMemoryError, Jfp8kvError, StepError
from jfp8kv.engine.driver import EngineDriver, Subscription
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.loop import Update
from jfp8kv.engine.request import CANCELLED, Request
from jfp8kv.engine.stats import Stats
from jfp8kv.sampling.params import SamplingParams

WAIT_S = 20  # for what happens at once unless it never does


def request(tokens: int = 3, **fields: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, **fields)
    return Request([1], params, np.zeros(2, np.uint32), max_tokens=tokens)


class FakeEngine(Engine):
    """Each step appends one token, and its text, to every request. `during` runs in the step."""

    def __init__(self, during: Callable[[], object] = lambda: None):
        self.queue: list[Request] = []
        self.during = during
        self.steps = 0
        self.stats = Stats(kv_bytes_capacity=1234)
        self.running = threading.Lock()
        self.dropped: Any = []
        self.freed: list[Any] = []

    def add(self, request: Request) -> None:
        self.queue.append(request)

    def _end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request in self.queue:
            self.queue.remove(request)
        request.notify()

    def cancel(self, requests: Any) -> None:
        for r in requests:
            if r.finish_reason is None:
                self._end(r, CANCELLED)

    def expire_deadlines(self, now: float) -> None:
        for r in list(self.queue):
            if r.deadline <= now:
                self._end(r, "deadline")

    def free_dropped(self) -> None:
        self.freed += self.dropped
        self.dropped.clear()

    def ensure_pool(self) -> None:
        pass

    def abandon(self, requests: Any, error: Jfp8kvError) -> None:
        for r in requests:
            r.error = error
            self._end(r, CANCELLED)

    def step(self) -> None:
        assert self.running.acquire(blocking=False), "one step at a time"
        try:
            self.steps += 1
            self.during()
            for r in list(self.queue):
                r.output_ids.append(self.steps)
                r.text += f"{len(r.output_ids)} "
                if len(r.output_ids) == r.max_tokens:
                    self._end(r, "length")
                r.notify()
        finally:
            self.running.release()


class Gate:
    """Called inside a step: reports that the step runs, and holds it until it is opened."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.inside.set()
        assert self.open.wait(WAIT_S)


@contextlib.contextmanager
def background(function: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run `function` in a thread, and check that it ends."""
    thread = threading.Thread(target=function)
    thread.start()
    yield thread
    thread.join(WAIT_S)
    assert not thread.is_alive()


# -- requests --------------------------------------------------------------------------------------


def test_requests_of_all_threads_advance_with_every_step() -> None:
    everyone = threading.Barrier(4)
    engine = FakeEngine()
    driver = EngineDriver(engine)
    requests = [request(30) for _ in range(4)]

    def caller(mine: Request) -> None:
        stream = driver.stream(mine)
        next(stream)
        everyone.wait(WAIT_S)
        assert len(list(stream)) == 29

    with ThreadPoolExecutor(4) as pool:
        for run in [pool.submit(caller, mine) for mine in requests]:
            run.result(timeout=WAIT_S)
    assert all(len(r.output_ids) == 30 for r in requests)
    assert engine.steps <= 34, "one after another they would take 120"


def test_a_short_request_returns_while_a_long_one_of_another_thread_runs() -> None:
    gate = Gate()
    engine = FakeEngine(gate)
    driver = EngineDriver(engine)
    with background(lambda: pytest.raises(StepError, driver.run, [request(10_000)])):
        assert gate.inside.wait(WAIT_S)
        gate.open.set()
        short = request(2)
        driver.run([short])
        assert short.finish_reason == "length"
        engine.during = lambda: 1 / 0


def test_requests_finish_in_order_of_length_and_are_counted() -> None:
    driver = EngineDriver(FakeEngine())
    requests = [request(tokens) for tokens in (3, 1, 2)]
    counts: list[int] = []
    driver.run(requests, on_finish=counts.append)
    assert counts == [1, 1, 1] and all(r.finish_reason == "length" for r in requests)


def test_exclusive_work_starts_after_the_running_step() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    stopped = request(100_000)
    submitted = driver.stream(stopped)
    next(submitted)

    def drain() -> None:
        with contextlib.suppress(StepError):
            driver.run([request(100_000)])

    with background(drain):
        for _ in range(20):
            before = engine.steps
            assert driver.call(lambda engine: engine.steps) <= before + 2
        engine.during = lambda: 1 / 0


def test_steps_run_only_while_a_caller_waits() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    stream = driver.stream(request(50))
    assert [next(stream), next(stream)] == ["1 ", "2 "]
    driver.flush()
    assert engine.steps == 2
    other = driver.stream(request(50))
    assert next(other) == "1 " and engine.steps == 3
    assert next(stream) == "3 ", "the step of the other stream advanced this one"
    assert engine.steps == 3


def test_a_request_is_cancelled_without_waiting_for_the_running_step() -> None:
    gate = Gate()
    engine = FakeEngine(gate)
    driver = EngineDriver(engine)
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    cancelled = request(50)
    subscription = Subscription(driver, updates.put)
    subscription.submit([cancelled])
    subscription.wait()
    assert gate.inside.wait(WAIT_S)
    subscription.cancel()
    assert cancelled in engine.queue, "the step writes to its pages"
    gate.open.set()
    assert updates.get(timeout=WAIT_S).finished
    assert cancelled.finish_reason == CANCELLED and not engine.queue and engine.steps == 1


def test_a_dropped_stream_cancels_its_request() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    stream = driver.stream(request(50))
    next(stream)
    assert len(engine.queue) == 1
    del stream
    driver.flush()
    assert not engine.queue


def test_a_closed_stream_is_cancelled_when_close_returns() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    stream = driver.stream(request(50))
    next(stream)
    stream.close()
    assert not engine.queue and list(stream) == []
    never_read = driver.stream(request(50))
    never_read.close()
    assert not engine.queue


def test_a_stream_collected_during_a_step_in_the_engine_thread_is_cancelled_after_it() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    streams = [driver.stream(dropped := request(50))]
    next(streams[0])
    engine.during = streams.clear
    other = request(2)
    driver.run([other])
    driver.flush()
    assert dropped.finish_reason == CANCELLED and len(dropped.output_ids) == 2
    assert other.finish_reason == "length"


def test_pages_of_dropped_sequences_are_freed_from_any_thread_and_inside_a_step() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    outside, inside = (object.__new__(SequenceHandle) for _ in range(2))
    driver.release([outside])
    engine.during = lambda: driver.release([inside])
    driver.run([request(1)])
    driver.flush()
    assert engine.freed == [outside, inside]


def test_a_deadline_ends_a_waiting_or_running_request_with_its_output_so_far() -> None:
    now = [0.0]
    engine = FakeEngine()
    driver = EngineDriver(engine, clock=lambda: now[0])
    engine.during = lambda: now.__setitem__(0, now[0] + 1)
    late, soon, never = request(50, deadline_s=3.5), request(50, deadline_s=0.5), request(6)
    late.submitted = 0.0
    soon.submitted = -1.0
    driver.run([late, soon, never])
    assert [len(r.output_ids) for r in (late, soon, never)] == [4, 0, 6]
    assert [r.finish_reason for r in (late, soon, never)] == ["deadline", "deadline", "length"]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ValueError("seven\neight"), StepError, "a step failed: ValueError: seven. In-flight req"),
        (ValueError(), StepError, r"a step failed: ValueError: \(no message\). In-flight req"),
        (
            MemoryError(),
            DeviceMemoryError,
            "next to a KV cache of 1234 bytes.*smaller kv_cache_mem",
        ),
        (KeyboardInterrupt(), StepError, r"interrupted \(KeyboardInterrupt\)"),
        (SystemExit(), StepError, r"interrupted \(SystemExit\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_caller_gets_the_error_of_a_failed_step_and_the_next_is_served(
    raised: BaseException, kind: type[Jfp8kvError], message: str
) -> None:
    def during() -> None:
        if len(engine.queue) == 4:
            raise raised

    engine = FakeEngine(during)
    driver = EngineDriver(engine)
    errors: list[BaseException] = []

    def caller(run: Callable[[], object]) -> None:
        try:
            run()
        except BaseException as error:  # noqa: B036
            errors.append(error)

    async def read() -> None:
        async for _ in driver.astream(request(10_000)):
            pass

    calls = [
        lambda: driver.run([request(10_000)]),
        lambda: list(driver.stream(request(10_000))),
        lambda: asyncio.run(read()),
        lambda: driver.run([request(10_000)]),
    ]
    threads = [threading.Thread(target=caller, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(errors) == 4 and not engine.queue
    assert len({id(error) for error in errors}) == 4, "a traceback belongs to one thread"
    for error in errors:
        assert error.__cause__ is raised
        with pytest.raises(kind, match=message):
            raise error
    after = request(2)
    driver.run([after])
    assert after.finish_reason == "length"


def test_a_request_that_finished_before_its_step_failed_is_complete() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    short, long = driver.stream(request(2)), driver.stream(request(9))
    next(short), next(long)
    step = engine.step

    def failing() -> None:
        step()
        raise ValueError("the next step cannot be dispatched")

    engine.step = failing  # type: ignore[method-assign]
    assert list(short) == ["2 "]
    assert next(long) == "2 "
    with pytest.raises(StepError, match="cannot be dispatched"):
        next(long)


def test_an_error_of_exclusive_work_ends_the_requests_in_flight() -> None:
    driver = EngineDriver(FakeEngine())
    stream = driver.stream(request(9))
    next(stream)
    with pytest.raises(StepError, match="ZeroDivisionError"):
        driver.call(lambda engine: 1 / 0)
    with pytest.raises(StepError, match="ZeroDivisionError"):
        list(stream)


def test_exclusive_work_that_is_refused_for_lack_of_pages_ends_no_request() -> None:
    def refuse(engine: Engine) -> None:
        raise CapacityError("sessions hold the rest")

    driver = EngineDriver(FakeEngine())
    stream = driver.stream(request(2))
    next(stream)
    with pytest.raises(CapacityError, match="sessions hold the rest"):
        driver.call(refuse)
    assert list(stream) == ["2 "]


def test_a_request_that_can_never_fit_is_refused_in_whichever_step_finds_out() -> None:
    def during() -> None:
        if big in engine.queue:
            big.error = CapacityError("sessions hold the rest")
            engine.cancel([big])

    engine = FakeEngine(during)
    driver = EngineDriver(engine)
    big, small = request(5), request(2)
    stream = driver.stream(big)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            next(stream)
        except CapacityError as error:
            errors.append(error)

    with background(read):
        driver.run([small])
    assert small.finish_reason == "length" and small.error is None
    assert "sessions hold the rest" in str(errors[0])


def test_an_engine_that_cannot_be_reset_hangs_no_caller() -> None:
    engine = FakeEngine(lambda: 1 / 0)
    driver = EngineDriver(engine)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(engine, "abandon", lambda requests, error: 1 / 0)
        with pytest.raises(StepError, match="ZeroDivisionError"):
            driver.run([request(5)])


# -- iterators of exclusive work -------------------------------------------------------------------


def test_requests_run_between_the_items_of_exclusive_work() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    stream = driver.stream(request(3))
    threads = set()

    def steps() -> Iterator[int]:
        for number in range(3):
            threads.add(threading.current_thread())
            yield number

    pieces = [(number, next(stream)) for number in driver.iterate(steps())]
    assert pieces == [(0, "1 "), (1, "2 "), (2, "3 ")]
    assert threads == {driver._thread}


def test_an_abandoned_iterator_of_exclusive_work_is_closed_in_the_engine_thread() -> None:
    driver = EngineDriver(FakeEngine())
    closed_in: list[threading.Thread] = []

    def steps() -> Iterator[int]:
        try:
            yield from range(3)
        finally:
            closed_in.append(threading.current_thread())

    items = driver.iterate(steps())
    assert next(items) == 0
    del items
    driver.flush()
    assert closed_in == [driver._thread]


def test_exclusive_work_may_call_the_driver_itself() -> None:
    driver = EngineDriver(FakeEngine())
    assert driver.call(lambda engine: driver.call(lambda engine: 5)) == 5
    driver.call(lambda engine: driver.flush())


# -- interrupts ------------------------------------------------------------------------------------


@pytest.fixture
def sigint() -> Iterator[None]:
    """Set Python's SIGINT handler: a background process starts with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


WAITING_CALLS: dict[str, Callable[[EngineDriver], object]] = {
    "run": lambda driver: driver.run([request(2)]),
    "stream": lambda driver: next(driver.stream(request(2))),
    "call": lambda driver: driver.call(lambda engine: None),
    "iterate": lambda driver: list(driver.iterate(iter([1]))),
    "flush": lambda driver: driver.flush(),
}


@pytest.mark.parametrize("name", WAITING_CALLS)
def test_an_interrupt_ends_the_call_that_waits_and_nothing_else(name: str, sigint: None) -> None:
    gate = Gate()
    engine = FakeEngine(gate)
    driver = EngineDriver(engine)
    other = request(3)
    interrupted = threading.Event()

    def interrupt() -> None:
        assert gate.inside.wait(WAIT_S)
        while not interrupted.wait(0.01):  # again: the first may come before the wait began
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with background(lambda: driver.run([other])):
        assert gate.inside.wait(WAIT_S)
        with background(interrupt):
            try:
                WAITING_CALLS[name](driver)
            except KeyboardInterrupt:
                interrupted.set()
            finally:
                gate.open.set()
    assert interrupted.is_set()
    driver.flush()
    assert other.finish_reason == "length" and other.error is None and not engine.queue
    after = request(2)
    driver.run([after])
    assert after.finish_reason == "length"


# -- event loops -----------------------------------------------------------------------------------


def test_the_event_loop_runs_while_a_step_does() -> None:
    gate = Gate()

    async def main() -> None:
        driver = EngineDriver(FakeEngine(gate))
        stream = driver.astream(request(1))
        waiting = asyncio.create_task(anext(stream))
        while not gate.inside.is_set():
            await asyncio.sleep(0)
        gate.open.set()  # which only a loop that is not blocked can do
        assert await waiting == "1 "

    asyncio.run(main())


def test_several_event_loops_share_an_engine() -> None:
    driver = EngineDriver(FakeEngine())

    async def read() -> list[str]:
        return [piece async for piece in driver.astream(request(20))]

    async def main() -> list[list[str]]:
        return await asyncio.gather(*(read() for _ in range(5)))

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(asyncio.run, main()) for _ in range(3)]
        texts = [text for run in runs for text in run.result(timeout=WAIT_S)]
    assert ["".join(text).split() for text in texts] == [[str(i) for i in range(1, 21)]] * 15


def test_a_stream_whose_event_loop_is_gone_is_cancelled_and_disturbs_no_other() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    loop = asyncio.new_event_loop()
    stream = driver.astream(request(50))
    assert loop.run_until_complete(anext(stream)) == "1 "
    loop.close()
    driver.run([request(3)])
    del stream
    driver.flush()
    assert not engine.queue


# -- lifetime --------------------------------------------------------------------------------------


def test_dropping_the_driver_frees_the_engine_and_ends_the_thread() -> None:
    engine = FakeEngine()
    driver = EngineDriver(engine)
    driver.run([request(2)])
    driver.call(lambda engine: None)
    thread, gone = driver._thread, weakref.ref(engine)
    gc.disable()
    try:
        del driver, engine
        assert gone() is None
    finally:
        gc.enable()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_an_engine_is_freed_after_a_failed_step_too() -> None:
    engine = FakeEngine(lambda: 1 / 0)
    driver = EngineDriver(engine)
    with pytest.raises(StepError):
        driver.run([request(2)])
    with pytest.raises(StepError):
        driver.call(lambda engine: 1 / 0)
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del driver, engine
        assert gone() is None
    finally:
        gc.enable()


def test_close_ends_requests_in_flight_and_later_calls_with_a_clear_error() -> None:
    gate = Gate()
    engine = FakeEngine(gate)
    driver = EngineDriver(engine)
    errors: list[BaseException] = []

    def caller() -> None:
        try:
            driver.run([request(50)])
        except ConfigError as error:
            errors.append(error)

    with background(caller):
        assert gate.inside.wait(WAIT_S)
        with background(driver.close):
            gate.open.set()
    assert "this LLM is closed" in str(errors[0])
    driver.close()
    for call in (
        lambda: driver.run([request(1)]),
        lambda: list(driver.stream(request(1))),
        lambda: driver.call(lambda engine: None),
        lambda: list(driver.iterate(iter([1]))),
        lambda: asyncio.run(anext(driver.astream(request(1)))),
        lambda: driver.engine,
    ):
        with pytest.raises(ConfigError, match="this LLM is closed: create another"):
            call()
    driver.flush()
    driver.release([])
    gone = weakref.ref(engine)
    del engine, gate
    gc.collect()
    assert gone() is None, "the memory is free though the driver is still referred to"


def test_calls_in_a_process_without_the_engine_thread_raise_instead_of_waiting() -> None:
    """As after a fork, which copies no thread."""
    driver = EngineDriver(FakeEngine())
    driver._inbox.put(None)
    driver._thread.join(WAIT_S)
    with pytest.raises(ConfigError, match="create the LLM after a fork"):
        driver.run([request(1)])


SCRIPTS = {
    "a daemon thread waits": """
        threading.Thread(target=driver.run, args=([request(10**9)],), daemon=True).start()
    """,
    "a thread still runs a request": """
        threading.Thread(target=driver.run, args=([request(300)],)).start()
    """,
    "a stream was abandoned": """
        stream = driver.stream(request(10**9))
        next(stream)
    """,
    "an asynchronous stream was abandoned": """
        stream = driver.astream(request(10**9))
        asyncio.new_event_loop().run_until_complete(anext(stream))
    """,
    "the engine was closed": """
        driver.close()
    """,
    "the main thread failed": """
        next(stream := driver.stream(request(10**9)))
        raise KeyboardInterrupt
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_interpreter_exits_at_once(name: str) -> None:
    script = f"""
        import asyncio, threading
        from jfp8kv.engine.driver import EngineDriver
        from tests.engine.test_driver import FakeEngine, request
        driver = EngineDriver(FakeEngine())
        {textwrap.dedent(SCRIPTS[name]).strip().replace(chr(10), chr(10) + " " * 8)}
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    failed = name == "the main thread failed"
    assert (done.returncode != 0) == failed, done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == failed
    assert "Fatal" not in done.stderr and time.monotonic() - began < 100
