"""Option classes: frozen dataclasses whose fields declare their default, range and help text.

An option is declared once. Everything else is derived from the declaration: `Options.from_fields`
takes keywords, `Options.specs` describes the fields to a schema or a parser, `core.keywords` writes
the `TypedDict` for signatures, and the class docstring lists every field.

    @options
    class EngineOptions(Options):
        page_size: int = option(default=64, help="Number of tokens per page.", minimum=1)

This module imports nothing heavy, so that `jfp8kv --help` does not wait for JAX.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

from jfp8kv.core.errors import ConfigError, invalid_choice, unknown_keyword

_SPEC = "option"
_NUMBERS = {int: "a whole number", float: "a number"}
_SEQUENCES = (tuple, list, Sequence)
_DOC_WIDTH = 96
C = TypeVar("C", bound="type[Options]")
F = TypeVar("F", bound=Callable[..., Any])
Self = TypeVar("Self", bound="Options")


@dataclasses.dataclass(frozen=True)
class OptionSpec:
    """One option: its name, type, default and help, and the values it allows.

    `annotation` is the declared type. `types` are its union members without None, `choices` the
    values of a `Literal`, and `element` the item type of a sequence.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    minimum: int | float | None = None
    above: int | float | None = None
    maximum: int | float | None = None
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
        """The values of all `Literal` members: the known names; empty for other types."""
        literals = (m for m in self.types if typing.get_origin(m) is typing.Literal)
        return tuple(value for literal in literals for value in typing.get_args(literal))

    @property
    def closed(self) -> bool:
        """Whether the only allowed values are `choices` and, if the option is optional, None."""
        return all(typing.get_origin(member) is typing.Literal for member in self.types)

    @property
    def is_sequence(self) -> bool:
        """Whether the type is a sequence such as `Sequence[int]`, or an optional one."""
        return len(self.types) == 1 and typing.get_origin(self.types[0]) in _SEQUENCES

    @property
    def element(self) -> Any:
        """The type of the items of a sequence; None for other types."""
        return typing.get_args(self.types[0])[0] if self.is_sequence else None

    @property
    def range(self) -> str:
        """The allowed range in words, such as "of at least 1"; empty if there is none."""
        parts = []
        if self.minimum is not None:
            parts.append(f"of at least {_format_limit(self.minimum)}")
        if self.above is not None:
            parts.append(f"above {_format_limit(self.above)}")
        if self.maximum is not None:
            parts.append(f"at most {_format_limit(self.maximum)}")
        return " and ".join(parts)

    def checked(self, value: Any) -> Any:
        """Return `value` in its stored form.

        Raises `ConfigError` with the given value, the allowed values and what to try.
        """
        if self.convert is not None:
            return self.convert(value)
        if value is None and self.optional:
            return None
        if self.closed:
            if not any(type(value) is type(c) and value == c for c in self.choices):
                raise invalid_choice(self.name, value, self.choices)
            return value
        if self.element is not None:
            return self._sequence(value)
        if len(self.types) == 1:
            return self._scalar(self.types[0], value)
        return value

    def _scalar(self, kind: Any, value: Any) -> Any:
        if kind in _NUMBERS:
            return self._number(kind, value)
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{self.name}={value!r}: must be True or False.")
        if kind is str and not isinstance(value, str):
            raise ConfigError(f"{self.name}={value!r}: must be a string{self._hint}.")
        return value

    def _sequence(self, values: Any) -> tuple[Any, ...]:
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise ConfigError(f"{self.name}={values!r}: must be a list{self._hint}.")
        return tuple(self._scalar(self.element, value) for value in values)

    def _number(self, kind: Any, value: Any) -> int | float:
        known = numbers.Integral if kind is int else numbers.Real
        number = isinstance(value, known) and not isinstance(value, bool)
        if not number or not self._in_range(value):
            allowed = " ".join(filter(None, (_NUMBERS[kind], self.range)))
            raise ConfigError(f"{self.name}={value!r}: must be {allowed}{self._hint}.")
        return kind(value)

    def _in_range(self, value: Any) -> bool:
        return bool(
            (isinstance(value, numbers.Integral) or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    @property
    def _hint(self) -> str:
        return f"; {self.hint}" if self.hint else ""

    def describe(self) -> str:
        """Return the help sentence with the type, the range and the default, for docstrings."""
        names = map(repr, self.choices) if self.choices else map(_type_name, self.types)
        allowed = ", ".join(filter(None, (" | ".join(names), self.range.removeprefix("of "))))
        default = "" if self.default is None else f" Default: {self.default!r}."
        return f"{self.name} ({allowed}): {self.help}{default}"


def option(
    *,
    default: Any,
    help: str,
    minimum: int | float | None = None,
    above: int | float | None = None,
    maximum: int | float | None = None,
    hint: str = "",
    convert: Callable[[Any], Any] | None = None,
    hash: bool = True,
) -> Any:
    """Declare a field of an option class. Type checkers know the default by its keyword (PEP 681).

    Args:
      default: the value if none is given.
      help: a sentence that says what the option does. If the default is None, a second sentence
        says what that means: "By default ...".
      minimum, above, maximum: the range of a number, or of each number of a sequence.
      hint: what to try instead of an invalid value; ends the error message.
      convert: checks and converts a value of any other type. Raises `ConfigError`.
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
    """Make `cls`, a subclass of `Options`, a frozen dataclass, with its fields in its docstring."""
    decorated = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    decorated.__init__ = _suggest_keywords(decorated.__init__)  # type: ignore[method-assign]
    # Invalid values are reported by `OptionSpec.checked`, never by a run-time type checker.
    decorated.__no_type_check__ = True  # type: ignore[attr-defined]
    own_doc = typing.cast(str, cls.__doc__).rstrip()
    decorated.__doc__ = f"{own_doc}\n\n{fields_section(decorated)}"
    return typing.cast(C, decorated)


def _suggest_keywords(init: F) -> F:
    """Return an `__init__` whose `ConfigError` for an unknown keyword names the nearest field."""

    @functools.wraps(init)
    def checked_init(self: "Options", **fields: Any) -> None:
        known = self.names()
        for name in fields:
            if name not in known:
                raise unknown_keyword(name, known)
        init(self, **fields)

    return typing.cast(F, checked_init)


class Options:
    """Base class of option classes. Creating an instance checks all fields together."""

    ARGUMENT: ClassVar[str] = "options"  # the usual name of a parameter that takes these options

    def __post_init__(self) -> None:
        for spec in self.specs():
            object.__setattr__(self, spec.name, spec.checked(getattr(self, spec.name)))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for an invalid combination of fields. Subclasses override it."""

    @classmethod
    def specs(cls) -> list[OptionSpec]:
        """Return all options, in the order of their declaration."""
        return [
            OptionSpec(
                field.name, _resolved(cls, field.type), field.default, **field.metadata[_SPEC]
            )
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options."""
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def from_fields(
        cls: type[Self], base: object = None, *, also: Iterable[str] = (), **fields: Any
    ) -> Self:
        """Return `base` (or the defaults) with `fields` replaced.

        Raises `ConfigError` for an unknown field. The message names the nearest of the known fields
        and of `also`, the other keywords of the calling function.
        """
        if base is not None and not isinstance(base, cls):
            raise ConfigError(f"{cls.ARGUMENT}={base!r}: must be a {cls.__name__} or None.")
        known = cls.names()
        for name in fields:
            if name not in known:
                raise unknown_keyword(name, [*also, *known])
        if base is None:
            return cls(**fields)
        return dataclasses.replace(base, **fields)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, in their stored form."""
        return {name: getattr(self, name) for name in self.names()}


def takes(*classes: type[Options]) -> Callable[[F], F]:
    """Document the options that a function, or the `__init__` of a class, takes as `**keywords`.

    Its signature lists each option in place of `**keywords`, for `help()` and for completion in
    notebooks, and its docstring ends with their help.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        known = {parameter.name for parameter in parameters}
        parameters += [
            inspect.Parameter(
                spec.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=spec.default,
                annotation=spec.annotation,
            )
            for cls in classes
            for spec in cls.specs()
            if spec.name not in known
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        sections = [fields_section(cls, title=cls.__name__) for cls in classes]
        function.__doc__ = "\n\n".join([(function.__doc__ or "").rstrip(), *sections])
        return function

    return decorate


def fields_section(cls: type[Options], title: str = "Fields") -> str:
    """Return a section of a docstring with one entry for each option of `cls`."""
    wrapper = textwrap.TextWrapper(
        _DOC_WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
        break_long_words=False,
    )
    entries = (wrapper.fill(spec.describe()) for spec in cls.specs())
    return "\n".join([f"    {title}:", *entries, "    "])


def _resolved(cls: type, annotation: Any) -> Any:
    """Return the type that the annotation of a field stands for. A string is evaluated.

    A type that is only imported under `TYPE_CHECKING` is unknown at run time and becomes a
    `ForwardRef`: such an option needs `convert`.
    """
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, vars(sys.modules[cls.__module__]))
    except NameError:
        return typing.ForwardRef(annotation)


def _type_name(kind: Any) -> str:
    """Return the name of a type, without its module."""
    if isinstance(kind, typing.ForwardRef):
        return kind.__forward_arg__
    name = getattr(kind, "__name__", str(kind))
    arguments = ", ".join(map(_type_name, typing.get_args(kind)))
    return f"{name}[{arguments}]" if arguments else name


def _format_limit(limit: int | float) -> str:
    """Return a limit as text. Large limits of the form 2**n - 1 are written like that."""
    if isinstance(limit, int) and limit >= 2**31 - 1 and not limit & (limit + 1):
        return f"2**{limit.bit_length()} - 1"
    return f"{limit:g}"
