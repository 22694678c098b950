"""Options of calibration, comparison, planning and benchmarks: stored forms and refusals."""

import dataclasses
import inspect

import pytest

import jfp8kv
from jfp8kv import ConfigError
from jfp8kv.quality.options import BenchOptions, CalibrationOptions, CompareOptions, PlanOptions


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(2048, 2048.0), ("2KiB", 2048.0), ("1.5 kB", 1500.0), ("60%", 600.0), (" 12.5 % ", 125.0)],
)
def test_a_budget_is_bytes_or_a_percentage_of_a_bfloat16_cache(budget, expected) -> None:
    assert PlanOptions(budget=budget).max_bytes_per_token(1000.0) == expected


@pytest.mark.parametrize("budget", ["0%", "-1", 0, -5, True, float("inf"), "60 percent", [60]])
def test_an_invalid_budget_is_refused(budget) -> None:
    with pytest.raises(ConfigError, match="budget="):
        PlanOptions(budget=budget)


def test_choices_keep_their_labels_when_options_are_replaced() -> None:
    options = CompareOptions(kv_dtypes={"half": "bfloat16"}, kv_scales=iter(["unit"]))
    again = dataclasses.replace(options, window=8)
    assert again.dtype_choices == (("half", "bfloat16"),)
    assert again.scales_choices == ((None, "unit"),)


def test_known_names_take_precedence_over_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fp9").write_text("not a plan")
    with pytest.raises(ConfigError, match="kv_dtype='fp9'"):
        CompareOptions(kv_dtypes=["fp9"])
    with pytest.raises(ConfigError, match="kv_dtype='fp9'"):
        BenchOptions(kv_dtypes=["fp9"])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (jfp8kv.calibrate, CalibrationOptions),
        (jfp8kv.compare, CompareOptions),
        (jfp8kv.plan_kv, PlanOptions),
        (jfp8kv.bench, BenchOptions),
    ],
)
def test_signature_and_docstring_of_a_function_list_its_options(function, options) -> None:
    parameters = inspect.signature(function).parameters
    for spec in options.specs():
        assert parameters[spec.name].default == spec.default
        assert f"{spec.name} (" in function.__doc__
