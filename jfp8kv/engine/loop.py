"""The engine thread: it runs the steps of one engine and delivers the results.

Only this thread uses the engine. Callers (engine/driver.py) put messages into its inbox: requests
to submit or to cancel, and functions to call between two steps. A step advances all requests.
Steps run while a caller waits for an update: a stream that is not read costs nothing. The next
step is a message too, so that all messages are served in order.

`SimpleQueue.put` is reentrant and never blocks, so a finalizer may put a message at any moment
and in any thread, this one included.

The thread refers to its engine only while it handles a message: dropping the driver frees the
engine.
"""

import dataclasses
import queue
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeAlias, TypeVar

from jfp8kv.core.errors import CapacityError, ConfigError, Jfp8kvError, StepError, step_error
from jfp8kv.core.log import logger
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.kv_manager import SequenceHandle
from jfp8kv.engine.request import Request

T = TypeVar("T")
Message: TypeAlias = "Callable[[EngineLoop], None]"
Inbox: TypeAlias = "queue.SimpleQueue[Message | None]"  # None ends the thread


@dataclasses.dataclass(frozen=True)
class Update:
    """A change of a request, for its caller. A finished request does not change again."""

    request: Request
    text: str  # new text since the last update, if the caller streams
    finished: bool


@dataclasses.dataclass(eq=False)
class Call(Generic[T]):
    """A function to call between two steps. Its result or its error is put into `outcome`.

    `outcome` is a queue and not a future. A future and its error refer to each other, through the
    traceback, and would keep the engine alive until the next garbage collection.
    """

    function: Callable[[Engine], T]
    outcome: "queue.SimpleQueue[tuple[T | None, BaseException | None]]" = dataclasses.field(
        default_factory=queue.SimpleQueue
    )
    cancelled: bool = False  # the caller no longer waits


@dataclasses.dataclass(eq=False)
class Channel:
    """The requests of one caller, as the engine thread knows them, and where their updates go."""

    deliver: Callable[[Update], object]
    stream: bool  # deliver new text too, not only the end of a request
    until_finished: bool  # the caller waits from the first submission to the end of all requests
    requests: dict[Request, None] = dataclasses.field(default_factory=dict)  # an ordered set
    sent: int = 0  # characters of the stream that were delivered


class EngineLoop:
    """The state of an engine thread, and the handlers of its messages."""

    def __init__(self, engine: Engine, inbox: Inbox, clock: Callable[[], float]):
        self.engine: Engine | None = engine  # None once closed
        self.clock = clock
        self._inbox = inbox
        self._channels: dict[Request, Channel] = {}  # of the requests in flight
        self._with_deadline: set[Request] = set()
        self._waiting: set[Channel] = set()  # callers that wait for an update
        self._updated: list[Request] = []  # since the last delivery
        self._step_queued = False

    def handle(self, message: Message) -> None:
        """Handle one message. An error ends all requests in flight; the next message is served."""
        try:
            message(self)
            if self.engine is not None:
                self.engine.free_dropped()
        except BaseException as error:  # noqa: BLE001 (all callers get it)
            self._fail(error)
        self._deliver()
        if self._waiting and not self._step_queued:
            self._step_queued = True
            self._inbox.put(EngineLoop.step)

    # -- messages ----------------------------------------------------------------------------------

    def step(self) -> None:
        """Run a step of the engine, if a caller still waits."""
        self._step_queued = False
        if not self._waiting:
            return
        engine = self._ready_engine()
        if self._with_deadline:
            engine.expire_deadlines(self.clock())
        engine.step()

    def submit(self, channel: Channel, requests: Sequence[Request]) -> None:
        """Queue requests whose updates go to `channel`."""
        engine = self._open_engine()
        for request in requests:
            request.on_update = self._updated.append
            self._channels[request] = channel
            channel.requests[request] = None
            if request.params.deadline_s is not None:
                self._with_deadline.add(request)
        if channel.until_finished:
            self.wait_for(channel)
        for request in requests:
            engine.add(request)

    def wait_for(self, channel: Channel) -> None:
        """Run steps until there is an update for `channel`."""
        if channel.requests:
            self._waiting.add(channel)

    def cancel(self, channel: Channel, requests: Iterable[Request] | None = None) -> None:
        """Cancel requests of `channel` (None: all of them) and free their pages."""
        chosen = channel.requests if requests is None else requests
        self._open_engine().cancel([r for r in chosen if r in channel.requests])

    def release(self, handles: Iterable[SequenceHandle]) -> None:
        """Free the pages of sequences that are not requests."""
        self._open_engine().dropped.extend(handles)

    def call(self, call: Call[T]) -> None:
        """Call a function with the engine.

        `CapacityError` leaves the engine intact, and a `StepError` has been reported. Any other
        error is handled like that of a step.
        """
        if call.cancelled:
            return
        try:
            result = call.function(self._ready_engine())
        except (CapacityError, StepError) as error:
            call.outcome.put((None, error))
        except BaseException as error:  # noqa: BLE001 (the caller gets it)
            call.outcome.put((None, self._fail(error)))
        else:
            call.outcome.put((result, None))

    def close(self) -> None:
        """End all requests with an error and release the engine."""
        for request in self._channels:
            request.abort(closed_error())
        self._updated += self._channels
        self._deliver()
        self.engine = None

    # -- helpers -----------------------------------------------------------------------------------

    def _open_engine(self) -> Engine:
        assert self.engine is not None, "the thread handles no message after `close`"
        return self.engine

    def _ready_engine(self) -> Engine:
        """Return the engine, with a new pool if a failed step lost it."""
        engine = self._open_engine()
        engine.ensure_pool()
        return engine

    def _fail(self, error: BaseException) -> Jfp8kvError:
        """End all requests in flight after an error, and return the error that callers get."""
        self._deliver()  # results from before the error are valid
        engine = self._open_engine()
        reported = step_error(error, cache_bytes=engine.stats.kv_bytes_capacity)
        _clear_frames(error)
        if reported is not error:
            reported.__cause__ = error
        requests = list(self._channels)
        logger.warning("%s (%d requests in flight)", str(reported), len(requests))
        try:
            engine.abandon(requests, reported)
        except BaseException:  # noqa: BLE001 (no caller may wait forever)
            logger.exception("the engine could not be reset")
            for request in requests:
                request.abort(reported)
        self._updated += requests
        return reported

    def _deliver(self) -> None:
        """Hand updates to the callers."""
        updated = list(self._updated)
        self._updated.clear()
        for request in updated:
            channel = self._channels.get(request)
            if channel is None:
                continue  # it was delivered as finished
            finished = request.finish_reason is not None
            if finished:
                self._unsubscribe(request, channel)
            text = ""
            if channel.stream:
                text = request.text[channel.sent :]
                channel.sent += len(text)
            if not finished and not text:
                continue
            if not channel.until_finished or not channel.requests:
                self._waiting.discard(channel)
            channel.deliver(Update(request, text, finished))

    def _unsubscribe(self, request: Request, channel: Channel) -> None:
        request.on_update = None
        del self._channels[request]
        del channel.requests[request]
        self._with_deadline.discard(request)


def serve(loop_ref: "weakref.ref[EngineLoop]", inbox: Inbox) -> None:
    """Handle messages until the loop is closed or garbage collected, in the engine thread."""
    for message in iter(inbox.get, None):
        loop = loop_ref()
        if loop is None:
            return
        loop.handle(message)
        if loop.engine is None:
            return
        del message, loop  # a waiting thread must not keep the engine alive


def closed_error() -> ConfigError:
    """Return the error of a call on a closed engine."""
    return ConfigError("this LLM is closed: create another.")


def _clear_frames(error: BaseException) -> None:
    """Clear the frames of an error's traceback, whose local variables refer to device arrays."""
    trace = error.__traceback__
    if trace is not None:
        error.__traceback__ = trace.tb_next  # the first frame is still running
        traceback.clear_frames(trace.tb_next)
