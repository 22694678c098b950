"""Every error a user can meet, under one base class.

A message says three things: what was given, what is allowed, what to try. A broken invariant of our own is an `assert`
instead: it is a bug, not a mistake of the user's.
"""

import difflib
from collections.abc import Iterable


class Jfp8kvError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(Jfp8kvError, ValueError):
    """A value, keyword or prompt that cannot be served as given."""


class CheckpointError(Jfp8kvError, ValueError):
    """A checkpoint that is missing, damaged, incomplete or of a kind that is not read."""


class CapacityError(ConfigError):
    """A request that could never fit the cache or the model's context."""


class StepError(Jfp8kvError, RuntimeError):
    """A step failed or was interrupted, and the requests in it were dropped; the next call is served."""


class DeviceMemoryError(Jfp8kvError, MemoryError):
    """The device has no room for the KV cache, or for a step beside it."""


class NotSupported(Jfp8kvError):
    """This implementation, device or version cannot do that; the message says what can."""


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name closest to `given`, or an empty string when none is close."""
    close = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_keyword(name: str, allowed: Iterable[str], *, meant: str | None = None) -> ConfigError:
    """The error for a keyword nobody knows: names it, the one `meant` or else the nearest, and all there are."""
    allowed = list(allowed)
    return ConfigError(
        f"{name}: no such keyword.{did_you_mean(meant or name, allowed)} There are {', '.join(allowed)}."
    )


def invalid_choice(what: str, given: object, allowed: Iterable[str]) -> ConfigError:
    """The error for a value outside a closed list: names the value, the list and the nearest entry."""
    allowed = list(allowed)
    return ConfigError(
        f"{what}={given!r}: must be one of {', '.join(map(repr, allowed))}.{did_you_mean(given, allowed)}"
    )
