"""Access to one engine from any thread or event loop.

Callers do not use the engine directly. They put messages into the inbox of its thread
(engine/loop.py), and results come back through queues. Submitting and cancelling never block. Both
take effect between two steps.
"""

import asyncio
import atexit
import contextlib
import enum
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar, cast, runtime_checkable

from jfp8kv.core.errors import ConfigError, Jfp8kvError
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.loop import (
    Call,
    Channel,
    EngineLoop,
    Inbox,
    Message,
    Update,
    closed_error,
    serve,
)
from jfp8kv.engine.request import Request

T = TypeVar("T")
Item = TypeVar("Item")
Output = TypeVar("Output", covariant=True)

EXIT_TIMEOUT_S = 10.0  # the longest wait for a running step when the interpreter exits


class _End(enum.Enum):
    """The end of an iterator, as a value."""

    END = enum.auto()


@runtime_checkable
class Group(Protocol[Output]):
    """Requests with one common output, such as the `n` continuations of a prompt."""

    @property
    def requests(self) -> list[Request]: ...

    def output(self) -> Output:
        """Return the output, once all requests are finished."""
        ...


class EngineDriver:
    """Runs an engine in a separate thread and gives all callers access to it.

    Args:
      engine: from now on only the engine thread may use it, except for constant attributes.
      clock: returns the time that deadlines are compared with, in seconds, as `Request.submitted`.

    All methods may be called from any thread. After `close` they raise `ConfigError`.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.perf_counter):
        self._inbox: Inbox = queue.SimpleQueue()
        self._loop = EngineLoop(engine, self._inbox, clock)
        self._closed = False
        self._lock = threading.Lock()  # no message that needs an answer is put after `close`
        self._thread = threading.Thread(
            target=serve,
            args=(weakref.ref(self._loop), self._inbox),
            name="jfp8kv-engine",
            daemon=True,
        )
        weakref.finalize(self, self._inbox.put, None).atexit = False
        self._thread.start()
        _drivers.add(self)

    @property
    def engine(self) -> Engine:
        """The engine. Raises `ConfigError` once it is closed."""
        engine = self._loop.engine
        if engine is None or self._closed:
            raise closed_error()
        return engine

    # -- requests ----------------------------------------------------------------------------------

    def run(
        self,
        requests: Sequence[Request],
        *,
        on_finish: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Run requests to completion. `on_finish` is called with the number that just finished.

        Raises the error of the first request that has one, and cancels the others.
        """
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        try:
            with Subscription(self, updates.put, until_finished=True) as subscription:
                subscription.submit(requests)
                for _ in requests:
                    update = subscription.receive(updates.get())
                    _raise_error(update.request)
                    on_finish(1)
        except BaseException:
            self.flush()
            raise

    def stream(self, request: Request) -> "EngineIterator[str]":
        """Run a request and yield its text, piece by piece."""
        return EngineIterator(self, self._stream(request))

    def _stream(self, request: Request) -> Generator[str, None, None]:
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        with Subscription(self, updates.put, stream=True) as subscription:
            subscription.submit([request])
            finished = False
            while not finished:
                if updates.empty():
                    subscription.wait()
                update = subscription.receive(updates.get())
                finished = update.finished
                if update.text:
                    yield update.text
            _raise_error(request)

    async def astream(self, request: Request) -> AsyncIterator[str]:
        """Run a request and yield its text, piece by piece. Nothing blocks the event loop."""
        event_loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update] = asyncio.Queue()

        def deliver(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed
                event_loop.call_soon_threadsafe(updates.put_nowait, update)

        with Subscription(self, deliver, stream=True) as subscription:
            subscription.submit([request])
            finished = False
            while not finished:
                if updates.empty():
                    subscription.wait()
                update = subscription.receive(await updates.get())
                finished = update.finished
                if update.text:
                    yield update.text
            _raise_error(request)

    def run_iter(
        self, make_group: Callable[[Item], Group[Output]], items: Iterable[Item], *, limit: int
    ) -> "EngineIterator[tuple[int, Output | Jfp8kvError]]":
        """Run the requests of `items`, and yield `(number, output)` of each item as it finishes.

        Args:
          make_group: returns the requests of an item. If it raises a `Jfp8kvError`, that is the
            result of the item. Other exceptions propagate.
          items: counted from 0, and taken only while fewer than `limit` groups are in flight.
            Neither memory nor the time to the first result grows with their number.
          limit: the maximum number of groups in flight.

        If a step fails, its error is the result of all groups in flight. Later items still run.
        """
        return EngineIterator(self, self._run_iter(make_group, items, limit))

    def _run_iter(
        self, make_group: Callable[[Item], Group[Output]], items: Iterable[Item], limit: int
    ) -> Generator[tuple[int, Output | Jfp8kvError], None, None]:
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        remaining = enumerate(items)
        exhausted = False
        in_flight: dict[int, Group[Output]] = {}
        unfinished: dict[int, int] = {}  # requests of each group
        numbers: dict[Request, int] = {}
        with Subscription(self, updates.put) as subscription:
            while True:
                while not exhausted and len(in_flight) < limit:
                    try:
                        number, item = next(remaining)
                    except StopIteration:
                        exhausted = True
                        break
                    try:
                        group = make_group(item)
                    except Jfp8kvError as error:
                        yield number, error
                        continue
                    in_flight[number] = group
                    unfinished[number] = len(group.requests)
                    numbers.update(dict.fromkeys(group.requests, number))
                    subscription.submit(group.requests)
                if not in_flight:
                    return
                if updates.empty():
                    subscription.wait()
                request = subscription.receive(updates.get()).request
                number = numbers.pop(request)
                if number not in in_flight:
                    continue  # another request of the group failed
                unfinished[number] -= 1
                if request.error is None and unfinished[number]:
                    continue
                group = in_flight.pop(number)
                if request.error is not None:
                    subscription.cancel(group.requests)
                yield number, request.error or group.output()

    # -- exclusive work ----------------------------------------------------------------------------

    def call(self, function: Callable[[Engine], T]) -> T:
        """Call `function` in the engine thread, between two steps, and return its result.

        An error other than `CapacityError` ends all requests in flight, like a failed step.
        """
        if threading.current_thread() is self._thread:
            return function(self.engine)
        call = Call(function)
        self._post(partial(EngineLoop.call, call=call))
        try:
            result, error = call.outcome.get()
        except BaseException:
            call.cancelled = True  # interrupted; has no effect once the call has started
            raise
        if error is None:
            return cast(T, result)
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def iterate(self, steps: Iterator[T]) -> Iterator[T]:
        """Yield the items of `steps`. Each is computed in the engine thread, between two steps."""

        def next_item(engine: Engine) -> T | _End:
            return next(steps, _End.END)

        try:
            while True:
                item = self.call(next_item)
                if item is _End.END:
                    return
                yield item
                del item  # it may be large
        except BaseException:
            if isinstance(steps, Generator):
                self._inbox.put(lambda loop: steps.close())  # it may be running in that thread
            raise

    def release(self, handles: Iterable[SequenceHandle]) -> None:
        """Free the pages of sequences that are not requests, soon. Never blocks."""
        self._inbox.put(partial(EngineLoop.release, handles=list(handles)))

    def flush(self) -> None:
        """Wait until earlier messages, such as cancellations, have taken effect."""
        if threading.current_thread() is self._thread:
            return
        done = threading.Event()
        with contextlib.suppress(ConfigError):  # closed: nothing is left to wait for
            self._post(lambda loop: done.set())
            done.wait()

    # -- the thread --------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Stop the thread after the running step, and free the engine's memory.

        Requests in flight end with a `ConfigError`. Closing twice does nothing.
        """
        with self._lock:
            self._closed = True
            self._inbox.put(EngineLoop.close)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _post(self, message: Message) -> None:
        """Put a message whose effect the caller waits for."""
        with self._lock:
            if self._closed:
                raise closed_error()
            if not self._thread.is_alive():
                raise ConfigError(
                    "the engine thread does not run in this process: create the LLM after a fork, "
                    "not before."
                )
            self._inbox.put(message)


class Subscription:
    """The requests of one caller and their updates. Its end cancels unfinished requests.

    Args:
      driver: runs the requests.
      deliver: called in the engine thread with each update; must not block.
      stream: whether updates include new text. A stream has one request.
      until_finished: whether steps run until all requests are finished. If False, they run after
        `wait`, until the next update.
    """

    def __init__(
        self,
        driver: EngineDriver,
        deliver: Callable[[Update], object],
        *,
        stream: bool = False,
        until_finished: bool = False,
    ):
        self._driver = driver
        self._channel = Channel(deliver, stream, until_finished)
        self._unfinished = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests that `Engine.check` has passed."""
        self._unfinished += len(requests)
        self._driver._post(partial(EngineLoop.submit, channel=self._channel, requests=requests))

    def receive(self, update: Update) -> Update:
        """Count a finished request, and return `update`."""
        self._unfinished -= update.finished
        return update

    def wait(self) -> None:
        """Let steps run until the next update. Returns immediately."""
        self._driver._inbox.put(partial(EngineLoop.wait_for, channel=self._channel))

    def cancel(self, requests: Sequence[Request] | None = None) -> None:
        """Cancel requests (None: all) at the end of the running step. Never blocks."""
        message = partial(EngineLoop.cancel, channel=self._channel, requests=requests)
        self._driver._inbox.put(message)

    def __enter__(self) -> "Subscription":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __del__(self) -> None:
        self._end()  # an interrupt may prevent `__exit__`

    def _end(self) -> None:
        if self._unfinished:
            self.cancel()
            self._unfinished = 0


class EngineIterator(Iterator[T]):
    """An iterator over results of an engine. Closing or dropping it cancels what is in flight."""

    def __init__(self, driver: EngineDriver, items: Generator[T, None, None]):
        self._driver = driver
        self._items = items

    def __next__(self) -> T:
        return next(self._items)

    def close(self) -> None:
        """Cancel what is in flight, and wait until its pages are free."""
        self._items.close()
        self._driver.flush()


_drivers: "weakref.WeakSet[EngineDriver]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop all engine threads before JAX, whose handler was registered earlier, exits."""
    for driver in list(_drivers):
        driver.close(EXIT_TIMEOUT_S)


def _raise_error(request: Request) -> None:
    """Raise a copy of the error of a request, if it has one: a traceback belongs to one thread."""
    error = request.error
    if error is not None:
        raise type(error)(*error.args) from error.__cause__
