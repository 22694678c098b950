"""Many callers, one engine: a fake engine whose steps are counted, and threads that wait for one another."""

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jfp8kv.core.errors import CapacityError, ConfigError, DeviceMemoryError, Jfp8kvError, StepError
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.request import CANCELLED, Request
from jfp8kv.engine.stats import Stats
from jfp8kv.sampling.params import SamplingParams


def request(tokens: int = 3, **fields) -> Request:
    return Request(
        [1], SamplingParams(max_tokens=tokens, **fields), np.zeros(2, np.uint32), max_tokens=tokens
    )


class FakeEngine(Engine):
    """Each step gives one token to every request. `during` is called in the middle of a step."""

    def __init__(self, during=lambda: None):
        self.queue: list[Request] = []
        self.during, self.steps, self.readied, self.stats = (
            during,
            0,
            0,
            Stats(kv_bytes_capacity=1234),
        )
        self.running = threading.Lock()

    def add(self, request):
        self.queue.append(request)

    def _end(self, request, reason):
        request.finish_reason = reason
        if request in self.queue:
            self.queue.remove(request)

    def cancel(self, requests):
        for r in requests:
            if r.finish_reason is None:
                self._end(r, CANCELLED)

    def end_late(self, now):
        for r in list(self.queue):
            if r.deadline <= now:
                self._end(r, "deadline")

    def free_dropped(self):
        pass

    def ready(self):
        self.readied += 1

    def abandon(self, requests, error):
        for r in requests:
            r.error = error
            self._end(r, CANCELLED)

    def step(self):
        assert self.running.acquire(blocking=False), "one step at a time"
        try:
            self.steps += 1
            self.during()
            for r in list(self.queue):
                r.output_ids.append(self.steps)
                if len(r.output_ids) == r.max_tokens:
                    self._end(r, "length")
        finally:
            self.running.release()


def test_requests_of_all_threads_advance_with_every_step() -> None:
    engine = FakeEngine(lambda: time.sleep(0.001))
    service = EngineDriver(engine)
    all_there = threading.Barrier(4)

    def caller() -> Request:
        mine = request(30)
        service.submit([mine])
        all_there.wait(10)
        service.run([mine2 := request(10)])
        while mine.finish_reason is None:
            service.advance(lambda: mine.finish_reason is not None)
        assert len(mine2.output_ids) == 10
        return mine

    with ThreadPoolExecutor(4) as pool:
        done = [run.result(timeout=20) for run in [pool.submit(caller) for _ in range(4)]]
    assert all(len(r.output_ids) == 30 for r in done)
    assert engine.steps <= 41, "alone, one after another, they would take 160"


def test_a_caller_whose_request_ended_in_anothers_step_returns_though_that_one_goes_on() -> None:
    service = EngineDriver(engine := FakeEngine(lambda: time.sleep(0.002)))
    long, short = request(10_000), request(2)
    service.submit([short])
    other = threading.Thread(target=lambda: pytest.raises(StepError, service.run, [long]))
    other.start()
    while not short.output_ids:
        time.sleep(0.001)
    service.run([short])
    assert short.finish_reason == "length" and engine.steps < 20
    engine.during = lambda: 1 / 0
    other.join(10)
    assert not other.is_alive()


def test_turns_go_by_the_order_of_asking() -> None:
    """Somebody who wants the engine to itself is not passed over by those who run step after step."""
    service = EngineDriver(engine := FakeEngine(lambda: time.sleep(0.001)))
    stop = request(100_000)
    runner = threading.Thread(target=lambda: service.run([stop]))
    runner.start()
    for _ in range(20):
        before = engine.steps
        with service.turn():
            assert engine.steps <= before + 2
    service.drop([stop])
    runner.join(10)
    assert not runner.is_alive()


def test_a_request_is_dropped_without_waiting_for_the_step_that_runs() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def during() -> None:
        inside.set()
        assert go_on.wait(10)

    service = EngineDriver(engine := FakeEngine(during))
    dropped = request(50)
    runner = threading.Thread(target=service.run, args=([dropped],))
    runner.start()
    assert inside.wait(10)
    service.drop([dropped])
    assert dropped in engine.queue, "the step is writing to its pages"
    go_on.set()
    runner.join(10)
    assert dropped.finish_reason == CANCELLED and not engine.queue and engine.steps == 1


def test_a_request_that_comes_and_goes_while_others_are_put_away_is_gone() -> None:
    """Between any two notes another thread may add its own: they are kept in order."""
    service = EngineDriver(engine := FakeEngine())
    brief, cancel = request(50), engine.cancel

    def meanwhile(requests) -> None:
        if brief not in service._live:
            service.submit([brief])
            service.drop([brief])
        cancel(requests)

    engine.cancel = meanwhile
    service.run([request(1)])
    service.run([request(1)])
    assert brief.finish_reason == CANCELLED and not engine.queue


def test_what_a_step_itself_drops_is_dropped_when_it_ends() -> None:
    """As when garbage collection closes a stream in the middle of a step, in the thread that runs it."""
    service = EngineDriver(engine := FakeEngine())
    stream, other = request(50), request(2)
    service.submit([stream])
    engine.during = lambda: service.drop([stream])
    service.run([other])
    assert (
        stream.finish_reason == CANCELLED
        and len(stream.output_ids) == 1
        and other.finish_reason == "length"
    )


@pytest.mark.parametrize(
    ("raised", "theirs", "says"),
    [
        (
            ValueError("seven\neight"),
            StepError,
            "a step failed: ValueError: seven. All requests were dropped",
        ),
        (
            MemoryError(),
            DeviceMemoryError,
            "beside a KV cache of 1234 bytes.*smaller kv_cache_memory",
        ),
        (KeyboardInterrupt(), StepError, r"interrupted \(KeyboardInterrupt\)"),
    ],
)
def test_everybody_is_told_of_a_step_that_failed_and_the_next_is_served(
    raised, theirs, says
) -> None:
    def during() -> None:
        if len(engine.queue) == 2:
            raise raised

    service = EngineDriver(engine := FakeEngine(during))
    mine, others = request(10_000), request(10_000)
    heard: list[BaseException] = []

    def other() -> None:
        try:
            service.run([others])
        except BaseException as error:
            heard.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    while not engine.steps:
        time.sleep(0.001)
    try:
        service.run([mine])
    except BaseException as error:
        heard.append(error)
    thread.join(10)
    assert len(heard) == 2 and not engine.queue
    ran = [error for error in heard if error is raised or error.__cause__ is raised]
    assert ran, "who ran the step has the error itself, or its cause"
    kinds = {type(error) for error in heard}
    assert theirs in kinds and kinds <= {theirs, KeyboardInterrupt}
    for error in heard:
        if isinstance(error, Jfp8kvError):
            with pytest.raises(theirs, match=says):
                raise error
    service.run([next_one := request(2)])
    assert next_one.finish_reason == "length"


def test_a_step_of_anothers_that_fails_just_as_a_caller_looks_is_told(monkeypatch) -> None:
    class Doomed(Request):
        """Ended by that step between the question whether it met an error and the question whether it has ended."""

        @property
        def finish_reason(self) -> str:
            self.error = StepError("the other's step failed")
            return CANCELLED

        @finish_reason.setter
        def finish_reason(self, reason: str | None) -> None:
            pass

    service = EngineDriver(FakeEngine())
    monkeypatch.setattr(service, "advance", lambda until: None)
    with pytest.raises(StepError, match="the other's step failed"):
        service.run([Doomed([1], SamplingParams(), np.zeros(2, np.uint32), max_tokens=1)])


def test_what_is_refused_before_it_runs_drops_nothing() -> None:
    service = EngineDriver(FakeEngine())
    service.submit([kept := request(2)])
    with pytest.raises(ConfigError), service.turn():
        raise ConfigError("no")
    service.run([other := request(2)])
    assert kept.finish_reason == other.finish_reason == "length"


def test_a_request_that_can_never_fit_is_told_so_whoever_makes_the_step() -> None:
    def during() -> None:
        if big in engine.queue:
            big.error = CapacityError("sessions own the others")
            engine.cancel([big])

    service = EngineDriver(engine := FakeEngine(during))
    big, small = request(5), request(2)
    service.submit([big])
    service.run([small])
    assert small.finish_reason == "length" and small.error is None
    with pytest.raises(CapacityError, match="sessions own the others"):
        service.run([big])


def test_a_deadline_ends_a_request_waiting_or_running_with_what_it_has() -> None:
    now = [0.0]
    service = EngineDriver(engine := FakeEngine(), clock=lambda: now[0])
    engine.during = lambda: now.__setitem__(0, now[0] + 1)
    late, soon, never = request(50, deadline_s=3.5), request(50, deadline_s=0.5), request(6)
    for r in (late, soon):
        r.submitted = 0.0
    soon.submitted = -1.0
    service.run([late, soon, never])
    assert [len(r.output_ids) for r in (late, soon, never)] == [4, 0, 6]
    assert [r.finish_reason for r in (late, soon, never)] == ["deadline", "deadline", "length"]


def test_a_turn_that_an_interrupt_kept_from_being_given_back_is_taken_back() -> None:
    service = EngineDriver(FakeEngine())
    turn = service.turn()
    turn.__enter__()  # and the interrupt came just before __exit__
    service.run([mine := request(2)])
    assert mine.finish_reason == "length"


def test_an_interrupt_while_waiting_is_the_callers_own_and_leaves_the_line() -> None:
    """A signal reaches the main thread in its wait for the turn, which another has."""
    service = EngineDriver(engine := FakeEngine())
    taken, asked = threading.Event(), threading.Event()

    def holder() -> None:
        with service.turn():
            taken.set()
            while not service._line:
                time.sleep(0.001)
            time.sleep(0.05)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            while not asked.wait(
                2
            ):  # again, if the first came just before the wait began, which then does not hear of it
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=holder)
    thread.start()
    assert taken.wait(10)
    mine = request(2)
    with pytest.raises(KeyboardInterrupt):
        service.run([mine])
    assert not service._line
    asked.set()
    thread.join(10)
    assert mine.finish_reason == CANCELLED and mine.error is None and not engine.steps
    service.run([other := request(2)])
    assert other.finish_reason == "length"


def test_the_event_loop_runs_on_while_a_step_does() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def during() -> None:
        inside.set()
        assert go_on.wait(10)

    async def main() -> None:
        service = EngineDriver(FakeEngine(during))
        mine = request(1)
        service.submit([mine])
        waiting = asyncio.create_task(service.advance_async(lambda: mine.finish_reason is not None))
        while not inside.is_set():
            await asyncio.sleep(0)
        go_on.set()  # which only a loop that is not blocked gets to do
        await waiting
        assert mine.finish_reason == "length"

    asyncio.run(main())
