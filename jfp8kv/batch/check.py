"""A config file read and checked: every mistake named by file, line, key, what is allowed, and what was probably meant."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jfp8kv.batch import inputs, on_ray, outputs, templates, whole
from jfp8kv.batch.config import CalibrateFirst, Config, Observed, Section
from jfp8kv.batch.source import Source, read
from jfp8kv.core.errors import ConfigError, Jfp8kvError, did_you_mean

SCALES = ("auto", "checkpoint", "unit", "token_head")  # that have names
# Keys that belong to some tasks alone: given for another task they would be ignored, so they are refused.
BELONGS = {
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


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a file, with overrides `a.b=value`.

    Raises `ConfigError` for the first mistake in it, saying how many more there are.
    """
    source = read(path, overrides, short={"input": "path", "output": "path"})
    try:
        config = Config.model_validate(source.data)
    except ValidationError as error:
        each = {
            _keys(source.data, one): one for one in reversed(error.errors())
        }  # of alternatives the first speaks
        found = sorted(_placed(source, keys, one) for keys, one in each.items())
        more = (
            ""
            if len(found) == 1
            else f" (And {len(found) - 1} more mistake{'s' if len(found) > 2 else ''}.)"
        )
        raise ConfigError(found[0][1] + more) from None
    _check(source, config)
    return config


def schema() -> dict[str, Any]:
    """JSON Schema of a config, for editors to complete from."""
    return (
        {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        | Config.model_json_schema()
        | {"title": "jfp8kv batch"}
    )


# -- what pydantic found, in words ------------------------------------------------------------------------------------------


def _placed(source: Source, keys: tuple[str | int, ...], error: Any) -> tuple[int, str]:
    """The line of a mistake, 0 if it has none, and its message."""
    line = source.place(keys).rpartition(":")[2]
    return int(line) if line.isdigit() else 0, str(source.mistake(keys, _words(error, keys)))


def _keys(data: Any, error: Any) -> tuple[str | int, ...]:
    """Where a mistake is, as keys of the data: without the tags of alternatives that pydantic puts between them."""
    keys: list[str | int] = []
    for number, step in enumerate(error["loc"], 1):
        lacks = error["type"] == "missing" and number == len(error["loc"])
        if isinstance(data, dict) and (step in data or lacks):
            keys.append(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            keys.append(step)
            data = data[step]
    return tuple(keys)


def _words(error: Any, keys: tuple[str | int, ...]) -> str:
    given, context = error.get("input"), error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = list(_section(error["loc"][:-1]).model_fields)
            return f"no such key.{did_you_mean(keys[-1], known)} There are {', '.join(known)}."
        case "missing":
            return "is missing; every config needs it." if len(keys) == 1 else "is missing."
        case "literal_error":
            allowed = context["expected"]
            close = did_you_mean(
                given, [word for word in allowed.replace("'", "").replace(" or ", ", ").split(", ")]
            )
            return f"{given!r} is not allowed: must be {allowed}.{close}"
        case "greater_than_equal":
            return f"{given!r}: must be at least {context['ge']}."
        case "less_than":
            return f"{given!r}: must be less than {context['lt']}."
        case "too_short" | "too_long":
            return f"{given!r}: must have {context.get('min_length', context.get('max_length'))} values."
        case kind:
            wanted = _TYPES.get(kind, error["msg"][:1].lower() + error["msg"][1:])
            return f"{given!r}: must be {wanted}." if kind in _TYPES else f"{given!r}: {wanted}."


_TYPES = {
    "string_type": "text",
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
    """The model that a place in the config belongs to."""
    model: type[BaseModel] = Config
    for step in loc:
        field = model.model_fields.get(step) if isinstance(step, str) else None
        if field is not None and (inner := _models(field.annotation)):
            model = inner[0]
    return model


def _models(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]


# -- what no type can say ---------------------------------------------------------------------------------------------------


def _check(source: Source, config: Config) -> None:
    """Everything that can be known without the model and without reading rows."""
    for key, tasks in BELONGS.items():
        if key in config.model_fields_set and config.task not in tasks:
            raise source.mistake(
                (key,), f"belongs to task {' or '.join(tasks)}, and this one is {config.task!r}."
            )
    if config.task in whole.TASKS and (more := config.output.model_fields_set - {"path"}):
        raise source.mistake(
            ("output", min(more)),
            f"belongs to outputs of rows, and task {config.task!r} makes one thing of all.",
        )
    if config.prompt is not None and config.messages is not None:
        raise source.mistake(("messages",), "give either prompt or messages.")
    if config.runner == "ray":
        _asking(source, ("runner",), on_ray.check)
    elif "ray" in config.model_fields_set:
        raise source.mistake(("ray",), "belongs to runner ray, and this one is local.")
    if config.shard is not None and not 0 <= config.shard[0] < config.shard[1]:
        raise source.mistake(("shard",), f"{config.shard}: must be [i, n] with i from 0 to n - 1.")
    _check_templates(source, config)
    _check_sampling(source, config)
    _check_cache(source, config)
    _check_calibrations(source, config)
    _asking(source, ("input",), lambda: inputs.check(config.input))
    if inputs.format_of(config.input) == "openai":
        _check_openai(source, config)
    if config.task in ("generate", "score"):
        _asking(source, ("output",), lambda: outputs.check(config))
    _asking(source, ("output",), lambda: outputs.check_place(config))


def _check_openai(source: Source, config: Config) -> None:
    """What the requests say themselves is not the config's to say."""
    if config.task != "generate":
        raise source.mistake(("task",), "OpenAI batch requests are for task generate.")
    for key in ("prompt", "messages"):
        if getattr(config, key) is not None:
            raise source.mistake((key,), "OpenAI batch requests bring their own: leave it out.")


def _check_templates(source: Source, config: Config) -> None:
    for key in ("prompt", "completion"):
        if (text := getattr(config, key)) is not None:
            _asking(source, (key,), lambda text=text: templates.compiled(text))
    for number, message in enumerate(config.messages or ()):
        _asking(
            source,
            ("messages", number, "content"),
            lambda text=message.content: templates.compiled(text),
        )


def _check_sampling(source: Source, config: Config) -> None:
    if (fields := config.sampling.given()) == {}:
        return
    from jfp8kv.functional import SamplingParams

    try:
        held = SamplingParams(**fields).constraint
    except ConfigError as error:
        name = str(error).partition("=")[0].partition(":")[0]
        raise ConfigError(f"{source.place(('sampling', name))}: sampling.{error}") from None
    if held is not None and importlib.util.find_spec("llguidance") is None:
        raise source.mistake(
            ("sampling", held.field),
            "needs llguidance, which is not installed: pip install 'jfp8kv[structured]'.",
        )


def _check_cache(source: Source, config: Config) -> None:
    names: dict[tuple[str | int, ...], str] = {}
    match config.kv_dtype:
        case str(name):
            names[("kv_dtype",)] = name
        case [*each]:
            names |= {("kv_dtype", number): name for number, name in enumerate(each)}
        case by_layer:
            names |= {
                ("kv_dtype", key): getattr(by_layer, key) for key in ("default", "skip_dtype")
            }
    for keys, name in names.items():
        if name != "auto" and not Path(name).is_file():
            _asking(source, keys, lambda name=name: _check_format(name))
    scales, memory = config.kv_scales, config.engine.kv_cache_memory
    if isinstance(scales, str) and scales not in SCALES and not Path(scales).is_file():
        raise source.mistake(
            ("kv_scales",),
            f"{scales!r}: must be one of {', '.join(SCALES)}, or a file.{did_you_mean(scales, SCALES)}",
        )
    if memory is not None:
        _asking(source, ("engine", "kv_cache_memory"), lambda: _check_bytes(memory))


def _check_calibrations(source: Source, config: Config) -> None:
    """Scales that are to be found, and caches that are to be compared."""
    found: dict[tuple[str | int, ...], Observed] = {}
    if isinstance(config.kv_scales, CalibrateFirst):
        found[("kv_scales", "calibrate")] = first = config.kv_scales.calibrate
        _asking(source, ("kv_scales", "calibrate", "input"), lambda: inputs.check(first.input))
    if config.task == "calibrate":
        found[("calibration",)] = config.calibration
    for keys, how in found.items():
        _asking(source, ("kv_dtype",), lambda: whole.fp8_of(config))
        _asking(source, keys, lambda how=how: whole.calibration_asked(config, how))
    if config.task != "compare":
        return
    _asking(source, ("comparison",), lambda: whole.comparison_asked(config))
    if (texts := config.comparison.calibration) is not None:
        _asking(source, ("comparison", "calibration"), lambda: inputs.check(texts))
    elif wanting := {"tensor", "head", "channel"} & {*config.comparison.kv_scales}:
        raise source.mistake(
            ("comparison", "kv_scales"),
            f"{min(wanting)!r} scales are found on texts: give them as comparison.calibration.",
        )


def _check_bytes(memory: int | str) -> None:
    from jfp8kv.functional import parse_bytes

    parse_bytes(memory)


def _check_format(name: str) -> None:
    from jfp8kv.core.formats import kv_format

    kv_format(name)


def _asking(source: Source, keys: tuple[str | int, ...], ask: Any) -> None:
    """Have somebody check a value; what they say is said with its place."""
    try:
        ask()
    except Jfp8kvError as error:
        raise source.mistake(keys, str(error)) from None
