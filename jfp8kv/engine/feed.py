"""Requests from an iterator, results as they are made: what keeps an engine full without a list of everything.

Requests are taken only while fewer than `most` are in flight, so that neither memory nor the wait for a first result grows with
how many there are, and nobody waits for the slowest of a group.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jfp8kv.engine.driver import EngineDriver
from jfp8kv.engine.group import RequestGroup


def feed(
    service: EngineDriver, group_of: Callable[[Any], RequestGroup], asked: Iterable[Any], most: int
) -> Iterator[tuple[int, Any]]:
    """`(number, result)` of each of `asked`, counted from 0, in the order in which they finish.

    The result is what the group's `output()` gives, or the error that `group_of` raised for it, or the error of a step that it
    was in, which is everybody's who was: they are gone from the engine, and the next are taken. Closing the iterator cancels
    what is in flight.
    """
    coming, more = enumerate(asked), True
    flying: dict[int, RequestGroup] = {}
    try:
        while more or flying:
            while more and len(flying) < most:
                number, item = next(coming, (None, None))
                if more := number is not None:
                    try:
                        flying[number] = group_of(item)
                    except Exception as error:
                        yield number, error
                        continue
                    service.submit(flying[number].requests)
            failed = _advanced(service, flying) if flying else None
            for number, group in list(flying.items()):
                ended = _ended(group)
                error = _error(group) or (
                    None if ended else failed
                )  # what had ended before a step failed is whole
                if error or ended:
                    del flying[number]
                    service.drop(group.requests)
                    yield number, error or group.output()
    finally:
        service.drop([request for group in flying.values() for request in group.requests])


def _advanced(service: EngineDriver, flying: dict[int, RequestGroup]) -> Exception | None:
    """A step of ours, or others' steps until one of ours has ended: the error that it failed with, if it did."""
    try:
        service.advance(lambda: any(_error(group) or _ended(group) for group in flying.values()))
    except Exception as error:
        return error
    return None


def _ended(group: RequestGroup) -> bool:
    return all(request.finish_reason for request in group.requests)


def _error(group: RequestGroup) -> Exception | None:
    """What went wrong with one of its requests."""
    return next((request.error for request in group.requests if request.error is not None), None)
