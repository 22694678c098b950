"""Config sections derived from option classes, so that an option is declared once.

    @keys_from(SamplingParams, omit=("seed",))
    class SamplingSection(OptionsSection):
        ...

The pydantic model gets the default, the range and the help of each option, and its JSON Schema.
"""

import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    WithJsonSchema,
    create_model,
    model_validator,
)

from jfp8kv.core.options import Options, OptionSpec

S = TypeVar("S", bound="Section")
FROM_OPTION: Any = None  # marks a key whose default is the one of the option


class Section(BaseModel):
    """A mapping that refuses unknown keys and values of other types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


class OptionsSection(Section):
    """A section whose keys are options of the library. A null is the same as no key."""

    options_class: ClassVar[type[Options]] = Options
    option_names: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    @model_validator(mode="after")
    def _check_combination(self) -> "OptionsSection":
        self.options_class.from_fields(**self.given())
        return self

    def given(self) -> dict[str, Any]:
        """Return the options that the config gives, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set & self.option_names}


def keys_from(
    options: type[Options], *, only: Iterable[str] = (), omit: Iterable[str] = ()
) -> Callable[[type[S]], type[S]]:
    """Return a class decorator that adds the fields of an option class to a section.

    A field that the section declares itself has its own type and, if there is one, description. Its
    default and range are those of the option.

    Args:
      options: the option class.
      only: the options to add; empty for all of them.
      omit: options to leave out.
    """
    selected = set(only) or set(options.names())
    specs = {spec.name: spec for spec in options.specs() if spec.name in selected - set(omit)}

    def decorate(section: type[S]) -> type[S]:
        declared = typing.get_type_hints(section, include_extras=True)
        fields: dict[str, Any] = {}
        for name, spec in specs.items():
            own = section.model_fields.get(name)
            default = list(spec.default) if isinstance(spec.default, tuple) else spec.default
            if own is None:
                field = Field(default, description=spec.help)
                fields[name] = (_field_type(spec), field)
            else:
                limits = _json_limits(spec)
                description = own.description or spec.help
                field = Field(default, description=description, json_schema_extra=limits)
                fields[name] = (Annotated[declared[name], AfterValidator(_check(spec))], field)
        model = create_model(
            section.__name__,
            __base__=section,
            __doc__=section.__doc__,
            __module__=section.__module__,
            **fields,
        )
        if issubclass(model, OptionsSection):
            model.options_class = options
            model.option_names = frozenset(specs)
        return model

    return decorate


def _field_type(spec: OptionSpec) -> Any:
    """Return a type that accepts what the option accepts, with the JSON Schema of its values."""
    limits = Field(ge=spec.minimum, gt=spec.above, le=spec.maximum)
    schema = TypeAdapter(_yaml_type(spec.annotation, limits) | None).json_schema()
    return Annotated[Any, PlainValidator(_check(spec)), WithJsonSchema(schema)]


def _check(spec: OptionSpec) -> Callable[[Any], Any]:
    """Return a validator that refuses what the option refuses, and returns the value unchanged."""

    def check(value: Any) -> Any:
        spec.checked(value)
        return value

    return check


def _json_limits(spec: OptionSpec) -> dict[str, Any]:
    """Return the range of the option in terms of JSON Schema."""
    limits = {"minimum": spec.minimum, "exclusiveMinimum": spec.above, "maximum": spec.maximum}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _yaml_type(annotation: Any, limits: Any) -> Any:
    """Return the part of a type that YAML values can have; None if there is none.

    `limits` is the `Field` with the range of its numbers.
    """
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [_yaml_type(member, limits) for member in arguments]
        known = [member for member in members if member is not None]
        return typing.Union[tuple(known)] if known else None  # noqa: UP007
    if annotation in (int, float):
        return Annotated[annotation, limits]
    if origin is Literal or annotation in (bool, str, Any):
        return annotation
    if origin in (list, tuple, Iterable, Sequence):
        return types.GenericAlias(list, (_yaml_type(arguments[0], limits),))
    if origin in (dict, Mapping):
        return types.GenericAlias(dict, (arguments[0], _yaml_type(arguments[1], limits)))
    return None
