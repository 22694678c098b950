"""Option classes: frozen dataclasses whose fields carry their range and their sentence of help.

An option is declared once. Python keywords, YAML configs and the command line are derived from the
fields: `Options.from_fields` takes keywords, `Options.specs` lists what a schema or a parser needs.

    @options
    class EngineOptions(Options):
        max_num_seqs: int | None = option(None, "Most requests that run at once.", minimum=1)
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar, dataclass_transform

from jfp8kv.core.errors import ConfigError, invalid_choice, unknown_keyword

_SPEC = "option"
_NUMBERS = {int: "a whole number", float: "a number"}
C = TypeVar("C", bound="type[Options]")


@dataclasses.dataclass(frozen=True)
class OptionSpec:
    """One option: its name, type, default and help, and which values it allows.

    `types` are the members of its annotation without None; `choices` the values of a `Literal`.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    hint: str = ""
    convert: Callable[[Any], Any] | None = None

    @property
    def members(self) -> tuple[Any, ...]:
        """The members of the annotation, None included."""
        union = typing.get_origin(self.annotation) in (typing.Union, types.UnionType)
        return typing.get_args(self.annotation) if union else (self.annotation,)

    @property
    def optional(self) -> bool:
        """Whether None is allowed."""
        return types.NoneType in self.members

    @property
    def types(self) -> tuple[Any, ...]:
        """The members of the annotation other than None."""
        return tuple(member for member in self.members if member is not types.NoneType)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a `Literal`; empty for other types."""
        (only, *rest) = self.types
        return (
            () if rest or typing.get_origin(only) is not typing.Literal else typing.get_args(only)
        )

    @property
    def range(self) -> str:
        """The allowed range in words, such as "of at least 1"; empty where there is none."""
        parts = []
        if self.minimum is not None:
            parts.append(f"of at least {self.minimum:g}")
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.maximum is not None:
            parts.append(f"at most {self.maximum:g}")
        return " and ".join(parts)

    def checked(self, value: Any) -> Any:
        """`value` in its stored form. Raises `ConfigError`: what was given, what is allowed, what to try."""
        if self.convert is not None:
            return self.convert(value)
        if value is None and self.optional:
            return None
        if self.choices:
            if not any(value is choice or value == choice for choice in self.choices):
                raise invalid_choice(self.name, value, self.choices)
            return value
        (kind, *rest) = self.types
        if kind in _NUMBERS and not rest:
            return self._number(kind, value)
        if kind is bool and not rest and not isinstance(value, bool):
            raise ConfigError(f"{self.name}={value!r}: must be True or False.")
        if kind is str and not rest and not isinstance(value, str):
            raise ConfigError(f"{self.name}={value!r}: must be a string{self._hint}.")
        return value

    def _number(self, kind: type, value: Any) -> Any:
        known = numbers.Integral if kind is int else numbers.Real
        number = isinstance(value, known) and not isinstance(value, bool)
        if not number or math.isnan(value) or not self._in_range(value):
            allowed = " ".join(filter(None, (_NUMBERS[kind], self.range)))
            raise ConfigError(f"{self.name}={value!r}: must be {allowed}{self._hint}.")
        return kind(value)

    def _in_range(self, value: Any) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    @property
    def _hint(self) -> str:
        return f"; {self.hint}" if self.hint else ""


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    hint: str = "",
    convert: Callable[[Any], Any] | None = None,
    hash: bool = True,
) -> Any:
    """A field of an option class.

    Args:
      default: the value where none is given.
      help: one sentence: what the option does, and what its default means.
      minimum, above, maximum: the range of a number.
      hint: what to try instead of a value out of range; ends the error message.
      convert: checks and converts a value of any other type; raises `ConfigError`.
      hash: whether the field takes part in the hash of the options.
    """
    spec = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "hint": hint,
        "convert": convert,
    }
    return dataclasses.field(default=default, hash=None if hash else False, metadata={_SPEC: spec})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def options(cls: C) -> C:
    """Make `cls`, a subclass of `Options`, a frozen dataclass with keyword-only fields."""
    return typing.cast(C, dataclasses.dataclass(frozen=True, kw_only=True)(cls))


class Options:
    """Base of the option classes. Creating one checks every field; `check` checks fields together."""

    def __post_init__(self) -> None:
        for spec in self.specs():
            object.__setattr__(self, spec.name, spec.checked(getattr(self, spec.name)))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for fields that do not go together. Subclasses override it."""

    @classmethod
    def specs(cls) -> list[OptionSpec]:
        """All options, in the order of their declaration."""
        return [
            OptionSpec(field.name, field.type, field.default, **field.metadata[_SPEC])
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [spec.name for spec in cls.specs()]

    @classmethod
    def from_fields(
        cls, base: Self | None = None, *, also: Iterable[str] = (), **fields: Any
    ) -> Self:
        """`base` (or the defaults) with `fields` in place of its own.

        Raises `ConfigError` for an unknown field; it names the nearest of the known fields and of
        `also`, the other keywords of the function that passes the fields on.
        """
        known = cls.names()
        for name in fields:
            if name not in known:
                raise unknown_keyword(name, [*also, *known])
        if base is None:
            return cls(**fields)
        return dataclasses.replace(base, **fields)  # type: ignore[type-var]
