"""Load and validate a config. An error names the file, the line, the key and what is allowed."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jfp8kv.batch import outputs, templates
from jfp8kv.batch.config import (
    CalibrateFirst,
    Config,
    KVByLayer,
    calibration_options,
    fp8_format,
)
from jfp8kv.batch.option_sections import Section
from jfp8kv.batch.yaml_source import KeyPath, YamlSource, dotted, read_yaml
from jfp8kv.core.errors import ConfigError, Jfp8kvError, NotSupported, did_you_mean
from jfp8kv.core.paths import looks_like_path
from jfp8kv.engine.options import check_kv_dtype
from jfp8kv.quality.options import GRANULARITIES

# The tasks that a key applies to. It is refused for others, where it would have no effect.
TASKS_OF_KEYS: dict[str, tuple[str, ...]] = {
    "kv_dtype": ("generate", "score", "calibrate"),
    "kv_scales": ("generate", "score"),
    "completion": ("score",),
    "sampling": ("generate",),
    "calibration": ("calibrate",),
    "comparison": ("compare",),
    "engine": ("generate", "score", "calibrate"),
    "shard": ("generate", "score"),
    "runner": ("generate", "score"),
    "seed": ("generate",),
}
ROW_TASKS = ("generate", "score")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config at `path`.

    Args:
      path: a YAML file.
      overrides: assignments such as "sampling.temperature=0.2", in place of values in the file.

    Raises `ConfigError` for the first mistake, with the number of further ones.
    """
    source = read_yaml(Path(path), overrides, shorthand={"input": "path", "output": "path"})
    try:
        config = Config.model_validate(source.data)
    except ValidationError as error:
        raise _first_error(source, error) from None
    _check(source, config)
    return config


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config, for completion in editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "jfp8kv batch",
    }


# -- errors of pydantic ----------------------------------------------------------------------------


def _first_error(source: YamlSource, error: ValidationError) -> ConfigError:
    """Return the error that comes first in the file."""
    # A value has one error for each alternative of its type: the first one is used.
    errors = {_keys(source.data, details): details for details in reversed(error.errors())}
    found = sorted(
        (
            _line(source, keys),
            details["type"] == "missing",  # a misspelt key explains a missing one
            str(_as_config_error(source, keys, details)),
        )
        for keys, details in errors.items()
    )
    message = found[0][2]
    if len(found) > 1:
        message += f" (And {len(found) - 1} more mistake{'s' if len(found) > 2 else ''}.)"
    return ConfigError(message)


def _line(source: YamlSource, keys: KeyPath) -> int:
    """Return the line of a value, 0 if it is not in the file."""
    line = source.place(keys).rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def _keys(data: Any, details: ErrorDetails) -> KeyPath:
    """Return the key path of an error, without the tags that pydantic adds for alternatives."""
    keys: list[str | int] = []
    for number, step in enumerate(details["loc"], 1):
        missing = details["type"] == "missing" and number == len(details["loc"])
        if isinstance(data, dict) and (step in data or missing):
            keys.append(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            keys.append(step)
            data = data[step]
    return tuple(keys)


def _as_config_error(source: YamlSource, keys: KeyPath, details: ErrorDetails) -> ConfigError:
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # an error of an option class: "name=value: ..."
        return _option_error(source, keys, cause)
    return source.error(keys, _describe(details, keys))


def _option_error(source: YamlSource, keys: KeyPath, error: ConfigError) -> ConfigError:
    """Return an error of an option class with the place of the option in the config."""
    name = str(error).partition("=")[0]
    if keys and keys[-1] == name:  # the error of one option
        section = keys[:-1]
    elif isinstance(source.value(keys), dict) and name.isidentifier():  # of a combination
        section = keys
    else:
        return source.error(keys, str(error))
    prefix = f"{dotted(section)}." if section else ""
    return ConfigError(f"{source.place((*section, name))}: {prefix}{error}")


def _describe(details: ErrorDetails, keys: KeyPath) -> str:
    given = details["input"]
    context = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            known = list(_section(details["loc"][:-1]).model_fields)
            return f"no such key.{did_you_mean(keys[-1], known)} Keys: {', '.join(known)}."
        case "missing":
            return "is missing; every config needs it." if len(keys) == 1 else "is missing."
        case "literal_error":
            allowed = context["expected"]
            words = allowed.replace("'", "").replace(" or ", ", ").split(", ")
            return f"{given!r}: must be {allowed}.{did_you_mean(given, words)}"
        case "greater_than_equal":
            return f"{given!r}: must be at least {context['ge']}."
        case "too_short" | "too_long":
            length = context.get("min_length", context.get("max_length"))
            return f"{given!r}: must have {length} values."
        case kind if kind in _TYPE_NAMES:
            return f"{given!r}: must be {_TYPE_NAMES[kind]}."
    message = details["msg"]
    return f"{given!r}: {message[:1].lower()}{message[1:]}."


_TYPE_NAMES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys to values",
    "union_tag_not_found": "a name or a mapping",
    "union_tag_invalid": "a name or a mapping",
}


def _section(loc: Sequence[str | int]) -> type[BaseModel]:
    """Return the model of the section at a location of pydantic."""
    model: type[BaseModel] = Config
    for step in loc:
        field = model.model_fields.get(step) if isinstance(step, str) else None
        sections = [] if field is None else _sections(field.annotation)
        if sections:
            model = sections[0]
    return model


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections among the members of a type."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    members = getattr(annotation, "__args__", ())
    return [section for member in members for section in _sections(member)]


# -- checks beyond types ---------------------------------------------------------------------------


def _check(source: YamlSource, config: Config) -> None:
    """Check everything that needs neither the model nor the rows."""
    _check_keys(source, config)
    _check_templates(source, config)
    _check_structured_output(source, config)
    _check_cache(source, config)
    _check_calibrations(source, config)
    _check_at(source, ("input",), config.input.check)
    if config.input.row_format == "openai":
        _check_openai(source, config)
    if config.task in ROW_TASKS:
        _check_at(source, ("output",), partial(outputs.check_format, config))
    _check_at(source, ("output",), partial(outputs.check_path, config))


def _check_at(source: YamlSource, keys: KeyPath, check: Callable[[], object]) -> None:
    """Run a check. Its error is raised with the place of the value at `keys`."""
    try:
        check()
    except Jfp8kvError as error:
        raise source.error(keys, str(error)) from None


def _check_options_at(source: YamlSource, keys: KeyPath, check: Callable[[], object]) -> None:
    """Run a check of options. Its error is raised with the place of the option in a section."""
    try:
        check()
    except ConfigError as error:
        raise _option_error(source, keys, error) from None


def _check_keys(source: YamlSource, config: Config) -> None:
    """Check that the combination of keys is valid."""
    for key, tasks in TASKS_OF_KEYS.items():
        if key in config.model_fields_set and config.task not in tasks:
            raise source.error(
                (key,), f"applies to task {' or '.join(tasks)}; the task is {config.task!r}."
            )
    row_options = config.output.model_fields_set - {"path"}
    if config.task not in ROW_TASKS and row_options:
        raise source.error(
            ("output", min(row_options)),
            f"applies to tasks with an output row for each input row ({', '.join(ROW_TASKS)}); "
            f"the task is {config.task!r}.",
        )
    if config.prompt is not None and config.messages is not None:
        raise source.error(("messages",), "give either prompt or messages.")
    if config.prompt is not None and config.chat.given():
        raise source.error(("chat",), "the options of chat messages, and prompt is text.")
    if config.runner == "ray":
        _check_at(source, ("runner",), _require_ray)
    elif "ray" in config.model_fields_set:
        raise source.error(("ray",), "applies to runner ray; the runner is local.")
    if config.shard is not None and not 0 <= config.shard[0] < config.shard[1]:
        raise source.error(("shard",), f"{config.shard}: must be [i, n] with i from 0 to n - 1.")


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise NotSupported("needs Ray Data, which is not installed: pip install 'jfp8kv[ray]'.")


def _check_openai(source: YamlSource, config: Config) -> None:
    """Refuse keys whose values are in the requests."""
    if config.task != "generate":
        raise source.error(("task",), "OpenAI batch requests need task generate.")
    for key, value in (("prompt", config.prompt), ("messages", config.messages)):
        if value is not None:
            raise source.error((key,), "OpenAI batch requests have their prompts: leave it out.")


def _check_templates(source: YamlSource, config: Config) -> None:
    for key, text in (("prompt", config.prompt), ("completion", config.completion)):
        if text is not None:
            _check_at(source, (key,), partial(templates.compiled, text))
    for number, message in enumerate(config.messages or ()):
        keys = ("messages", number, "content")
        _check_at(source, keys, partial(templates.compiled, message.content))


def _check_structured_output(source: YamlSource, config: Config) -> None:
    constraint = config.sampling.options().constraint
    if constraint is not None and importlib.util.find_spec("llguidance") is None:
        raise source.error(
            ("sampling", constraint.field),
            "needs llguidance, which is not installed: pip install 'jfp8kv[structured]'.",
        )


def _check_cache(source: YamlSource, config: Config) -> None:
    for keys, name in _kv_dtype_names(config).items():
        _check_at(source, keys, partial(check_kv_dtype, name))
        _check_file(source, keys, name)
    if isinstance(config.kv_scales, str):
        _check_file(source, ("kv_scales",), config.kv_scales)


def _check_file(source: YamlSource, keys: KeyPath, name: str) -> None:
    """Check that a name that looks like a path is the path of a file."""
    if looks_like_path(name) and not Path(name).is_file():
        raise source.error(keys, f"{name}: no such file.")


def _kv_dtype_names(config: Config) -> Mapping[KeyPath, str]:
    """Return the format names in `kv_dtype`, by key path."""
    given = config.kv_dtype
    if isinstance(given, KVByLayer):
        return {
            ("kv_dtype", "default"): given.default,
            ("kv_dtype", "skip_dtype"): given.skip_dtype,
        }
    if isinstance(given, str):
        return {("kv_dtype",): given}
    return {("kv_dtype", number): name for number, name in enumerate(given)}


def _check_calibrations(source: YamlSource, config: Config) -> None:
    """Check calibrations and comparisons, and the files that they read."""
    if isinstance(config.kv_scales, CalibrateFirst):
        keys: KeyPath = ("kv_scales", "calibrate")
        section = config.kv_scales.calibrate
        _check_at(source, (*keys, "input"), section.input.check)
        _check_at(source, ("kv_dtype",), partial(fp8_format, config))
        _check_options_at(source, keys, partial(calibration_options, config, section))
    if config.task == "calibrate":
        check = partial(calibration_options, config, config.calibration)
        _check_at(source, ("kv_dtype",), partial(fp8_format, config))
        _check_options_at(source, ("calibration",), check)
    if config.task == "compare":
        _check_comparison(source, config)


def _check_comparison(source: YamlSource, config: Config) -> None:
    file = config.comparison.calibration
    calibrated = {*GRANULARITIES} & {*config.comparison.kv_scales}
    if file is not None:
        _check_at(source, ("comparison", "calibration"), file.check)
    elif calibrated:
        raise source.error(
            ("comparison", "kv_scales"),
            f"{min(calibrated)!r} scales need prompts: give them as comparison.calibration.",
        )
