"""One engine for many callers: threads, event loops and sessions, whose requests run together.

Whoever waits for a request runs the engine's next step when its turn comes, and a step advances everybody's requests: all are
served at once, without a thread of the engine's own. Turns go by the order of asking, and a caller whose request has got what
it waited for leaves the line at once.

To queue a request or to drop one nobody waits. It is noted, and done where a turn begins or ends: an event loop, or garbage
collection in the middle of a step, may ask for it.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jfp8kv.core.errors import ConfigError, StepError
from jfp8kv.engine import faults
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.request import Request

END = object()


@dataclasses.dataclass(eq=False)
class _Place:
    """Somebody's place in the line. `until` is asked between steps; `go` is set when it holds, or when the turn has come."""

    until: Callable[[], bool]
    go: threading.Event = dataclasses.field(default_factory=threading.Event)
    thread: int = dataclasses.field(default_factory=threading.get_ident)


class EngineDriver:
    """Runs an engine for whoever calls. `clock` is what deadlines are compared with: seconds, as `Request.submitted`."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.perf_counter):
        self.engine, self.clock = engine, clock
        # Held for moments, never during a step. Reentrant, since garbage collection may call `drop` while it is held.
        self._lock = threading.RLock()
        self._line: deque[_Place] = deque()
        self._holder: _Place | None = None
        self._noted: deque[tuple[Request, bool]] = (
            deque()
        )  # requests, and whether they come or go: in the order of asking
        self._live: weakref.WeakSet[Request] = (
            weakref.WeakSet()
        )  # whatever an interrupt may do to the scheduler's lists
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="jfp8kv")

    # -- requests -------------------------------------------------------------------------------------------------------

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests that `Engine.check` has passed."""
        with self._lock:
            requests = list(requests)
            self._live.update(requests)
            self._noted.extend((request, True) for request in requests)

    def drop(self, requests: Iterable[Request] = ()) -> None:
        """Cancel those not ended. Their pages, and those of sessions that are gone, are free now, or when the step that is
        running ends."""
        self._noted.extend((request, False) for request in requests)
        with self._lock:
            if self._holder is None:
                self._holder = place = _Place(_never)
                self._leave(place)

    def run(
        self, requests: Sequence[Request], *, ended: Callable[[int], Any] = lambda count: None
    ) -> None:
        """Run requests to their ends, calling `ended` with how many have just ended. Raises the error that one met, and drops
        the others then."""

        def over() -> bool:
            return all(r.finish_reason for r in requests) or any(r.error for r in requests)

        left = requests
        self.submit(requests)
        try:
            while left:
                self.advance(over)
                ran, left = left, [r for r in left if r.finish_reason is None]
                raise_error(
                    ran
                )  # asked last: a step of another's that fails sets it before a request's end
                ended(len(ran) - len(left))
        finally:
            self.drop(requests)

    # -- turns ----------------------------------------------------------------------------------------------------------

    def advance(self, until: Callable[[], bool]) -> None:
        """Wait until a step was made by this thread in its turn, or until `until` holds between two steps of others."""
        with self._turn(until) as mine:
            if mine and not until():
                self.engine.step()

    async def advance_async(self, until: Callable[[], bool]) -> None:
        """`advance` in a thread, which the event loop does not wait for."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self.advance, until)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Engine]:
        """The engine to oneself, between the steps of others."""
        with self._turn(_never):
            yield self.engine

    def each(self, steps: Iterator[Any]) -> Iterator[Any]:
        """What `steps` gives, each item made in a turn of its own, so that others get on in between."""
        item = None
        while item is not END:
            with self.turn():
                item = next(steps, END)
            if item is not END:
                yield item

    @contextlib.contextmanager
    def _turn(self, until: Callable[[], bool]) -> Iterator[bool]:
        """Whether it is our turn; if not, `until` holds."""
        place = _Place(until)
        try:
            mine = self._enter(place)
            with self._told() if mine else contextlib.nullcontext():
                if mine:
                    self.engine.ready()
                    self._settle()
                yield mine
        finally:
            self._leave(place)

    def _enter(self, place: _Place) -> bool:
        with self._lock:
            if self._holder is not None and self._holder.thread == place.thread:
                self._leave(
                    self._holder
                )  # Ctrl-C fell just where an earlier turn of this thread's was to be given back
            if self._holder is None:
                if place.until():
                    return False
                self._holder = place
                return True
            self._line.append(place)
        place.go.wait()
        return self._holder is place

    def _leave(self, place: _Place) -> None:
        """Give the turn, or the place in the line, back."""
        with self._lock:
            if place in self._line:
                self._line.remove(place)
            if self._holder is not place:
                return
            try:
                with self._told():
                    self._settle()
            finally:
                for done in [other for other in self._line if other.until()]:
                    self._line.remove(done)
                    done.go.set()
                self._holder = self._line.popleft() if self._line else None
                if self._holder is not None:
                    self._holder.go.set()

    def _settle(self) -> None:
        """What was noted, by whoever has the turn."""
        while self._noted:
            request, comes = self._noted.popleft()
            if comes:
                self.engine.add(request)
            else:
                self.engine.cancel([request])
        self.engine.end_late(self.clock())
        self.engine.free_dropped()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What fails in a turn fails for all that ran: they are told, and the engine begins anew."""
        try:
            yield
        except (ConfigError, StepError):
            raise  # refused before anything ran, or told already
        except BaseException as error:
            told = faults.step_error(error, cache_bytes=self.engine.stats.kv_bytes_capacity)
            with self._lock:
                coming = {
                    id(request) for request, comes in list(self._noted) if comes
                }  # a `drop` may add to them any moment
                lost = [r for r in self._live if r.finish_reason is None and id(r) not in coming]
            self.engine.abandon(lost, told)
            if told is error or not isinstance(error, Exception):
                raise
            raise told from error


def raise_error(requests: Iterable[Request]) -> None:
    """Raise what went wrong with one of them, if anything did. Each caller raises an error of its own: a traceback belongs to
    one thread."""
    for request in requests:
        if (error := request.error) is not None:
            raise type(error)(*error.args) from error.__cause__


def _never() -> bool:
    return False
