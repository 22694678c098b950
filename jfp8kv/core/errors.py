"""The errors of the library, under one base class.

A message has three parts: what was given, what is allowed, what to try. A broken invariant is an
`assert` instead: it is a bug of the library, not a mistake of the user.
"""

import difflib
from collections.abc import Iterable, Sequence


class Jfp8kvError(Exception):
    """Base class of all errors that the library raises on purpose."""


class ConfigError(Jfp8kvError, ValueError):
    """An invalid value, keyword or prompt."""


class CheckpointError(Jfp8kvError, ValueError):
    """A checkpoint that is missing, damaged, incomplete or of an unsupported kind."""


class CapacityError(ConfigError):
    """A request that can never fit the cache or the context length of the model."""


class StepError(Jfp8kvError, RuntimeError):
    """A step failed or was interrupted. Its requests were dropped; the engine is usable again."""


class DeviceMemoryError(Jfp8kvError, MemoryError):
    """The device has too little memory for the KV cache, or for a step in addition to it."""


class NotSupported(Jfp8kvError):
    """The implementation, device or version does not support this; the message says what does."""


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest allowed name, or "" if none is close."""
    close = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_keyword(name: str, allowed: Iterable[str]) -> ConfigError:
    """Return the error for an unknown keyword: its name, the closest known one, and all."""
    allowed = list(allowed)
    return ConfigError(
        f"{name}: no such keyword.{did_you_mean(name, allowed)} Keywords: {', '.join(allowed)}."
    )


def invalid_choice(what: str, given: object, allowed: Iterable[str], *others: str) -> ConfigError:
    """Return the error for a value that is not in a list of names.

    Args:
      what: the name of the argument.
      given: the value.
      allowed: the allowed names; the message suggests the closest.
      others: descriptions of other allowed values, such as "a KVScales".
    """
    allowed = list(allowed)
    listed = ", ".join([*map(repr, allowed), *others[:-1]])
    last = f", or {others[-1]}" if others else ""
    return ConfigError(
        f"{what}={given!r}: must be one of {listed}{last}.{did_you_mean(given, allowed)}"
    )


def check_unicode(text: str, what: str) -> str:
    """Return `text`. Raises `ConfigError` for a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ConfigError(
            f"{what} is not valid Unicode at character {error.start}: {lone!r} is a lone surrogate."
        ) from None
    return text


def number_ranges(numbers: Sequence[int], limit: int | None = None) -> str:
    """Return ascending numbers as ranges, for messages and tables.

    Args:
      numbers: in ascending order.
      limit: the most ranges to write; "..." stands for the rest.

    Example:
      >>> number_ranges([0, 1, 2, 5, 7, 8])
      '0-2, 5, 7-8'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    shown = [f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges]
    if limit is not None and len(shown) > limit:
        shown = [*shown[: limit - 1], "..."]
    return ", ".join(shown)


_RESET = "In-flight requests were aborted and the KV cache was reset; the engine is usable again"


def step_error(error: BaseException, *, cache_bytes: int) -> Jfp8kvError:
    """Return the error that callers get after a step raised `error`."""
    if isinstance(error, Jfp8kvError):
        return error
    if is_out_of_memory(error):
        return DeviceMemoryError(
            f"a step ran out of device memory next to a KV cache of {cache_bytes} bytes: "
            f"{first_line(error)} {_RESET}. If it happens again, create the LLM with a smaller "
            "kv_cache_memory, max_num_batched_tokens or max_num_seqs."
        )
    if isinstance(error, Exception):
        reason = f"a step failed: {type(error).__name__}: {first_line(error)}"
    else:
        reason = f"a step was interrupted ({type(error).__name__})."
    return StepError(f"{reason} {_RESET}: try again.")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device, or the host, had no memory left."""
    from jax.errors import JaxRuntimeError  # takes seconds: `jfp8kv --help` imports this module

    exhausted = isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as a sentence: messages of XLA fill pages."""
    lines = str(error).splitlines()
    line = lines[0].strip().rstrip(".") if lines else ""
    return f"{line or '(no message)'}."
