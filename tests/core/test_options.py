"""Option classes: one declaration gives the check, the error, the help and the keywords."""

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import pytest

from jfp8kv.core import keywords
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.options import Options, option, options, takes
from jfp8kv.engine.keywords import EngineFields
from jfp8kv.engine.options import EngineOptions
from jfp8kv.quality.options import (
    BenchOptions,
    CalibrationOptions,
    CompareOptions,
    PlanOptions,
)
from jfp8kv.sampling.keywords import SamplingFields
from jfp8kv.sampling.params import SamplingParams

OPTION_CLASSES = [
    EngineOptions,
    SamplingParams,
    CalibrationOptions,
    CompareOptions,
    PlanOptions,
    BenchOptions,
]


@options
class Example(Options):
    """Options of an example."""

    size: int = option(
        default=8, help="Size of the example.", minimum=1, maximum=2**31 - 1, hint="try 8"
    )
    rate: float | None = option(default=None, help="Rate of the example.", above=0)
    kind: Literal["a", "b"] = option(default="a", help="Kind of the example.")
    depths: Sequence[float] = option(
        default=(0.5,), help="Depths of the example.", minimum=0, maximum=1
    )
    name: "str" = option(default="x", help="Name of the example.")
    unknown: "NotImported | None" = option(  # noqa: F821
        default=None, help="An option of a type unknown at run time."
    )

    def check(self) -> None:
        """Refuse two fields together."""
        if self.kind == "b" and self.rate is not None:
            raise ConfigError("rate: not for kind b.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 0, "size=0: must be a whole number of at least 1 and at most 2**31 - 1; try 8."),
        ("size", True, "size=True: must be a whole number"),
        ("size", 1.0, "size=1.0: must be a whole number"),
        ("rate", 0, "rate=0: must be a number above 0."),
        ("rate", float("inf"), "rate=inf: must be a number above 0."),
        ("rate", float("nan"), "rate=nan: must be a number above 0."),
        ("kind", "c", "kind='c': must be one of 'a', 'b'."),
        ("depths", [0.5, 2], "depths=2: must be a number of at least 0 and at most 1."),
        ("depths", "0.5", "depths='0.5': must be a list."),
        ("name", 1, "name=1: must be a string."),
    ],
)
def test_an_invalid_value_raises_with_the_allowed_ones(field, value, message) -> None:
    with pytest.raises(ConfigError) as error:
        Example(**{field: value})
    assert str(error.value).startswith(message)


def test_values_are_stored_as_plain_numbers_and_tuples() -> None:
    given = Example(rate=1, depths=[0, 1])
    assert (given.rate, type(given.rate)) == (1.0, float)
    assert given.depths == (0.0, 1.0)


def test_fields_are_checked_together_after_each_alone() -> None:
    with pytest.raises(ConfigError, match="rate: not for kind b"):
        Example(kind="b", rate=1.0)


def test_options_are_frozen_and_take_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().size = 3
    with pytest.raises(TypeError):
        Example(3)


@pytest.mark.parametrize(("given", "nearest"), [("sise", "size"), ("progres", "progress")])
def test_a_misspelt_keyword_raises_with_the_nearest_name(given, nearest) -> None:
    with pytest.raises(ConfigError, match=f"{given}: no such keyword. Did you mean '{nearest}'"):
        Example.from_fields(also=("progress",), **{given: 1})


def test_the_constructor_names_the_nearest_field_of_a_misspelt_keyword() -> None:
    with pytest.raises(ConfigError, match="sise: no such keyword. Did you mean 'size'"):
        Example(sise=1)
    assert list(inspect.signature(Example).parameters) == Example.names()


def test_from_fields_refuses_a_base_of_another_type() -> None:
    with pytest.raises(ConfigError, match="options=.*: must be a Example or None"):
        Example.from_fields({"size": 3})


def test_specs_describe_types_ranges_and_defaults() -> None:
    size, rate, kind, depths, name, unknown = Example.specs()
    assert (size.types, size.default, size.optional, size.minimum) == ((int,), 8, False, 1)
    assert (rate.types, rate.optional) == ((float,), True)
    assert (kind.choices, kind.closed) == (("a", "b"), True)
    assert (depths.element, name.types, unknown.choices) == (float, (str,), ())


def test_the_docstring_lists_every_option_with_its_help() -> None:
    for cls in OPTION_CLASSES:
        text = " ".join(cls.__doc__.split())
        for spec in cls.specs():
            assert f"{spec.name} (" in text and spec.help in text
            assert spec.help.endswith(".") and spec.help[0].isupper()


def test_a_function_that_takes_options_shows_them_in_its_signature() -> None:
    @takes(Example)
    def run(model: str, *, kind: str = "b", **fields: object) -> None:
        """Run an example."""

    names = list(run.__signature__.parameters)
    assert names == ["model", "kind", "size", "rate", "depths", "name", "unknown"]
    assert "Size of the example." in run.__doc__


def test_the_generated_keywords_are_in_step_with_the_options() -> None:
    for path, text in keywords.generated().items():
        assert path.read_text(encoding="utf-8") == text, "run `python -m jfp8kv.core.keywords`"
    pairs = {EngineOptions: EngineFields, SamplingParams: SamplingFields}
    for cls, fields in pairs.items():
        assert fields.__optional_keys__ == set(cls.names())


def test_option_modules_do_not_import_jax() -> None:
    modules = "jfp8kv.engine.options, jfp8kv.sampling.params, jfp8kv.quality.options"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
