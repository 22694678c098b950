"""Picks the implementation of paged attention, and says why."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jfp8kv.attention import reference, xla
from jfp8kv.attention.contract import Query
from jfp8kv.core.errors import NotSupported, one_of

Attention = Callable[..., Query]
IMPLEMENTATIONS = ("reference", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was chosen."""

    name: str
    attend: Attention
    why: str


def choose(implementation: Any = None) -> Choice:
    """The implementation asked for, or the fastest this machine can run.

    Raises `NotSupported` when the one asked for cannot run here, `ConfigError` for an unknown name.
    """
    if implementation == "reference":
        return Choice("reference", reference.attention, "asked for")
    if implementation == "xla":
        return Choice("xla", xla.attention, "asked for")
    if implementation == "pallas":
        raise NotSupported("attention='pallas': this version ships no GPU kernel; use 'xla', which runs on every backend.")
    if implementation is None:
        return Choice("xla", xla.attention, f"the one fast implementation for {jax.default_backend()} in this version")
    raise one_of("attention", implementation, IMPLEMENTATIONS)
