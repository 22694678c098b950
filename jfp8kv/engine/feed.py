"""Run requests from an iterator and return results as they finish.

The engine stays full without a list of all requests: they are taken only while fewer than `limit`
are in flight. Neither memory nor the wait for the first result grows with their number.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from jfp8kv.core.errors import Jfp8kvError
from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.request import Request

Item = TypeVar("Item")
Output = TypeVar("Output", covariant=True)


@runtime_checkable
class Group(Protocol[Output]):
    """Requests with one output."""

    @property
    def requests(self) -> list[Request]: ...

    def output(self) -> Output: ...


def feed(
    driver: EngineDriver,
    group_of: Callable[[Item], Group[Output]],
    items: Iterable[Item],
    limit: int,
) -> Iterator[tuple[int, Output | Jfp8kvError]]:
    """Yield `(number, result)` for each item, counted from 0, in the order they finish.

    The result is the group's `output()`, the `Jfp8kvError` that `group_of` raised, or the error of
    a failed step. A failed step ends all requests in flight, and the next ones are taken. Other
    exceptions propagate. Closing the iterator cancels what is in flight.
    """
    numbered = enumerate(items)
    exhausted = False
    in_flight: dict[int, Group[Output]] = {}
    try:
        while in_flight or not exhausted:
            while not exhausted and len(in_flight) < limit:
                try:
                    number, item = next(numbered)
                except StopIteration:
                    exhausted = True
                    break
                try:
                    group = group_of(item)
                except Jfp8kvError as error:
                    yield number, error
                    continue
                in_flight[number] = group
                driver.submit(group.requests)
            step_error = _advance(driver, in_flight) if in_flight else None
            for number, group in list(in_flight.items()):
                finished = _finished(group)
                # A group that finished before a step failed has its output.
                error = _error(group) or (None if finished else step_error)
                if error or finished:
                    del in_flight[number]
                    driver.drop(group.requests)
                    yield number, error or group.output()
    finally:
        driver.drop([request for group in in_flight.values() for request in group.requests])


def _advance(driver: EngineDriver, in_flight: dict[int, Group[Output]]) -> Jfp8kvError | None:
    """Run steps until a group is finished. Returns the error of a failed step, if any."""
    groups = list(in_flight.values())
    try:
        driver.advance(lambda: any(_error(group) or _finished(group) for group in groups))
    except Jfp8kvError as error:
        return error
    return None


def _finished(group: Group[Output]) -> bool:
    return all(request.finish_reason for request in group.requests)


def _error(group: Group[Output]) -> Jfp8kvError | None:
    """Return the error of one of the group's requests, if any."""
    return next((request.error for request in group.requests if request.error is not None), None)
