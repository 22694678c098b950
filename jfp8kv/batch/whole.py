"""Tasks that make one thing of all rows: scales for an FP8 cache (`calibrate`), a comparison of caches (`compare`).

Prompts are taken one by one. A row that is none stops them with its line, since it would be missing from the result unnoticed.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from jfp8kv.batch.config import CalibrateFirst, Config, File, KVByLayer, Observed
from jfp8kv.batch.inputs import Reader
from jfp8kv.batch.templates import RowError, prompter
from jfp8kv.core.errors import ConfigError

FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def prompts(config: Config, file: File) -> Iterator[Any]:
    """The prompt of every row, through the config's templates. Raises `ConfigError` with the line of one that has none."""
    make = prompter(config)
    with closing(iter(Reader(file))) as rows:
        for row in rows:
            try:
                yield make(row.fields())
            except RowError as error:
                raise ConfigError(f"{file.path}:{row.line}: {error}") from None


def fp8_of(config: Config) -> str:
    """The one FP8 format of the config's cache. Raises `ConfigError` if there is none, or two."""
    given = config.kv_dtype
    names = (
        given
        if isinstance(given, list)
        else [given.default if isinstance(given, KVByLayer) else given]
    )
    found = {name for name in names if name in FP8}
    if len(found) != 1:
        raise ConfigError(
            f"kv_dtype is {' and '.join(sorted(found or names))}: scales are found for one of {', '.join(FP8)}."
        )
    return found.pop()


def calibrated(
    config: Config, params: Any, file: File, how: Observed, *, progress: bool | None = False
) -> Any:
    """Scales for the config's cache from the prompts of a file, and how much they were made from (`CalibrationResult`)."""
    from jfp8kv.quality.calibrate import run_calibration

    return run_calibration(
        params, prompts(config, file), calibration_asked(config, how), progress=progress
    )


def calibration_asked(config: Config, how: Observed) -> Any:
    """A calibration, checked as far as that goes without a model (`CalibrationOptions`). Raises `ConfigError`."""
    from jfp8kv.quality.options import CalibrationOptions

    asked = how.model_dump(include=set(Observed.model_fields))
    return CalibrationOptions.from_fields(
        kv_dtype=fp8_of(config), max_model_len=config.engine.max_model_len, **asked
    )


def comparison_asked(config: Config) -> dict[str, Any]:
    """What `jfp8kv.compare` is asked, checked likewise. Raises `ConfigError`."""
    from jfp8kv.quality.options import CompareOptions

    given = config.comparison.model_dump(exclude={"calibration"}, exclude_none=True)
    CompareOptions.from_fields(**given)
    return given


def scales_first(config: Config, path: Path) -> tuple[Any, Any]:
    """The model, and the scales that the config has it find for itself: those in the file at `path`, or made and kept there."""
    from jfp8kv.functional import KVScales, load

    assert isinstance(config.kv_scales, CalibrateFirst)
    params = load(config.model, dtype=config.dtype, strict=config.strict)
    if not path.exists():
        how = config.kv_scales.calibrate
        _placed(path, calibrated(config, params, how.input, how).scales.save)
    return params, KVScales.load(path)


def calibrate(config: Config, *, progress: bool | None) -> tuple[dict[str, int], None]:
    """Write the scales; what they were made from."""
    from jfp8kv.functional import load

    params = load(config.model, dtype=config.dtype, strict=config.strict)
    done = calibrated(config, params, config.input, config.calibration, progress=progress)
    _placed(Path(config.output.path), done.scales.save)
    return _totals(done.prompts, done.tokens), None


def compare(config: Config, *, progress: bool | None) -> tuple[dict[str, int], Any]:
    """Write the comparison as JSON; what it was made from, and the comparison."""
    from jfp8kv.functional import load
    from jfp8kv.quality.compare import compare

    params = load(config.model, dtype=config.dtype, strict=config.strict)
    file = config.comparison.calibration
    report = compare(
        params,
        prompts(config, config.input),
        calibration=None if file is None else prompts(config, file),
        progress=progress,
        **comparison_asked(config),
    )
    text = json.dumps(report.to_dict(), allow_nan=False, indent=1)
    _placed(Path(config.output.path), lambda path: Path(path).write_text(text, encoding="utf-8"))
    return _totals(report.sequences, report.tokens), report


def _totals(rows: int, tokens: int) -> dict[str, int]:
    return {"rows": rows, "failed": 0, "prompt_tokens": tokens, "completion_tokens": 0}


def _placed(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written beside `path`, and put in its place once it is whole."""
    beside = path.with_name(
        f"{path.name}.{os.getpid()}.new"
    )  # workers may find the same scales at once
    write(beside)
    beside.replace(path)


TASKS: dict[str, Callable[..., tuple[dict[str, int], Any]]] = {
    "calibrate": calibrate,
    "compare": compare,
}
