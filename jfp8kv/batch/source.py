"""YAML text to plain data, with the line of every key, so that a mistake can be named where it stands."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from jfp8kv.core.errors import ConfigError

Keys = tuple[str | int, ...]  # the way to a value: names in mappings, numbers in lists


class Source:
    """A config as plain data, and where each of its values was given: a line of a file, or `--set`.

    Attributes:
      data: what the file says, overrides included.
      name: of the file, for messages.
    """

    def __init__(self, data: dict[str, Any], name: str, places: dict[Keys, str]):
        self.data = data
        self.name = name
        self._places = places

    def place(self, keys: Sequence[str | int]) -> str:
        """`file:line` of the value at `keys`, or of the innermost one around it that is there."""
        for stop in range(len(keys), -1, -1):
            if (place := self._places.get(tuple(keys[:stop]))) is not None:
                return place
        return self.name

    def mistake(self, keys: Sequence[str | int], message: str) -> ConfigError:
        """The error for the value at `keys`: place, keys, message."""
        return ConfigError(
            f"{self.place(keys)}: {dotted(keys)}: {message}"
            if keys
            else f"{self.place(keys)}: {message}"
        )


def dotted(keys: Sequence[str | int]) -> str:
    """`a.b[0]`, as users write it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(
        "."
    )


def read(
    path: Path, overrides: Sequence[str] = (), *, short: Mapping[str, str] = MappingProxyType({})
) -> Source:
    """The config in the file at `path`, with each override `a.b=value` (its value is YAML) in place of what it says.

    A key in `short` may be given as a text, which stands for a mapping with that text under the name that `short` has for it.

    Raises `ConfigError` for a file that cannot be read, is no YAML or no mapping, for a key given twice, and for an override
    that is none, each by line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text: {error.reason}.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}. Give the path of a YAML file."
        ) from None
    places: dict[Keys, str] = {(): str(path)}
    data = _parsed(text, str(path), places)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, such as `model: path`.")
    source = Source(data, str(path), places)
    for override in overrides:
        _override(source, override, short)
    return source


class _Loader(yaml.SafeLoader):
    """Safe, with plain scalars as the core schema of YAML 1.2 has them."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False", "tfTF"),
    ("null", r"~|null|Null|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?((0|[1-9][0-9_]*)?\.[0-9]+|(0|[1-9][0-9_]*)\.?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _parsed(text: str, name: str, places: dict[Keys, str]) -> Any:
    """The data in `text`; `places` gets the line of every value."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_twice(node, name)
        data = loader.construct_document(node)
        for keys, line in _lines(node, ()):
            places.setdefault(keys, f"{name}:{line}")
        return data
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{name}:{line}: is no valid YAML: {error.problem or error.context}."
        ) from None
    except ConfigError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a list may name itself as its part
        raise ConfigError(f"{name}: is no valid YAML: {error}.") from None
    finally:
        loader.dispose()


def _refuse_twice(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{name}:{key.start_mark.line + 1}: a key must be a name.")
            if key.value in seen and key.value != "<<":
                raise ConfigError(
                    f"{name}:{key.start_mark.line + 1}: {key.value} is given twice: keep one of them."
                )
            seen.add(key.value)
            _refuse_twice(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twice(value, name)


def _lines(node: yaml.Node, keys: Keys) -> Iterator[tuple[Keys, int]]:
    """The line of each value: of its key in a mapping, its own in a list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*keys, number), value.start_mark.line + 1
            yield from _lines(value, (*keys, number))


def _override(source: Source, override: str, short: Mapping[str, str]) -> None:
    """Put `a.b=value` into the data."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must be KEY=VALUE, such as sampling.temperature=0.2.")
    where = f"--set {override}"
    inside = source.data
    for key in keys[:-1]:
        if key in short and isinstance(inside.get(key), str):
            inside[key] = {short[key]: inside[key]}
        inside = inside.setdefault(key, {})
        if not isinstance(inside, dict):
            raise ConfigError(
                f"{where}: {key} is no mapping in {source.name}, so nothing can be set in it."
            )
    places: dict[Keys, str] = {}
    inside[keys[-1]] = _parsed(text, where, places)
    for stale in [at for at in source._places if at[: len(keys)] == keys]:
        del source._places[stale]
    for stop in range(1, len(keys) + 1):
        source._places.setdefault(keys[:stop], where)
