"""Tasks with one result for all rows: `calibrate` (scales of an FP8 cache) and `compare` (caches).

Prompts are read one by one. An invalid row stops the task, because leaving it out would silently
change the result.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.batch.config import (
    CalibrateFirst,
    CalibrationSection,
    Config,
    InputFile,
    calibration_options,
)
from jfp8kv.batch.journal import Totals
from jfp8kv.batch.templates import prompt_builder
from jfp8kv.core.errors import ConfigError
from jfp8kv.text.rows import RowError

if TYPE_CHECKING:
    from jfp8kv.cache.scales import KVScales
    from jfp8kv.models.params import Params
    from jfp8kv.quality.calibrate import CalibrationResult
    from jfp8kv.quality.quality_report import QualityReport
    from jfp8kv.text.prompts import Prompt


def read_prompts(config: Config, file: InputFile) -> "Iterator[Prompt]":
    """Yield the prompt of every row. Raises `ConfigError` with the line of an invalid row."""
    build = prompt_builder(config)
    with closing(iter(file.reader())) as rows:
        for row in rows:
            try:
                yield build(row.fields())
            except RowError as error:
                raise ConfigError(f"{file.path}:{row.line}: {error}") from None


def load_calibrated(config: Config, path: Path) -> "tuple[Params, KVScales]":
    """Load the model and the scales at `path`, which are calibrated if there is no such file."""
    from jfp8kv.cache.scales import KVScales

    assert isinstance(config.kv_scales, CalibrateFirst)
    params = _load_model(config)
    if not path.exists():
        section = config.kv_scales.calibrate
        result = _calibrate(config, params, section.input, section, progress=False)
        _write_atomically(path, result.scales.save)
    return params, KVScales.load(path)


def calibrate(config: Config, *, progress: bool | None) -> tuple[Totals, None]:
    """Write calibrated scales to the output. Return the number of prompts and tokens used."""
    params = _load_model(config)
    result = _calibrate(config, params, config.input, config.calibration, progress=progress)
    _write_atomically(Path(config.output.path), result.scales.save)
    return Totals(rows=result.prompts, prompt_tokens=result.tokens), None


def _calibrate(
    config: Config,
    params: "Params",
    file: InputFile,
    section: CalibrationSection,
    *,
    progress: bool | None,
) -> "CalibrationResult":
    """Calibrate scales for the cache of the config on the prompts of a file."""
    from jfp8kv.quality.calibrate import run_calibration

    options = calibration_options(config, section)
    return run_calibration(params, read_prompts(config, file), options, progress=progress)


def compare(config: Config, *, progress: bool | None) -> "tuple[Totals, QualityReport]":
    """Write a comparison of caches as JSON to the output. Return its totals and the report."""
    from jfp8kv.quality.compare import run_comparison

    file = config.comparison.calibration
    report = run_comparison(
        _load_model(config),
        read_prompts(config, config.input),
        config.comparison.options(),
        calibration=None if file is None else read_prompts(config, file),
        progress=progress,
    )
    text = json.dumps(report.to_dict(), allow_nan=False, indent=1)
    _write_atomically(
        Path(config.output.path), lambda path: Path(path).write_text(text, encoding="utf-8")
    )
    return Totals(rows=report.sequences, prompt_tokens=report.tokens), report


def _load_model(config: Config) -> "Params":
    from jfp8kv.checkpoint.load import load

    return load(config.model, dtype=config.dtype, strict=config.strict)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it to `path`.

    The name has the process id, because Ray workers may write the same scales at once.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    write(temporary)
    temporary.replace(path)


DATASET_TASKS: dict[str, Callable[..., tuple[Totals, Any]]] = {
    "calibrate": calibrate,
    "compare": compare,
}
