"""YAML configs as plain data, with the line of every value for error messages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jfp8kv.core.errors import ConfigError

KeyPath = tuple[str | int, ...]  # names in mappings, indices in lists


class YamlSource:
    """A config as plain data, and the place of each value: a line of the file, or `--set`.

    Attributes:
      data: the contents of the file, overrides included.
      name: the file, for error messages.
    """

    def __init__(self, data: dict[str, Any], name: str, places: dict[KeyPath, str]):
        self.data = data
        self.name = name
        self._places = places

    def value(self, keys: Sequence[str | int]) -> Any:
        """Return the value at `keys`; None if there is none."""
        value: Any = self.data
        for key in keys:
            try:
                value = value[key]
            except (LookupError, TypeError):
                return None
        return value

    def place(self, keys: Sequence[str | int]) -> str:
        """Return `file:line` of the value at `keys`, or of the nearest enclosing value."""
        for stop in range(len(keys), -1, -1):
            place = self._places.get(tuple(keys[:stop]))
            if place is not None:
                return place
        return self.name

    def error(self, keys: Sequence[str | int], message: str) -> ConfigError:
        """Return a `ConfigError` for the value at `keys`: place, keys, message."""
        where = f"{self.place(keys)}: {dotted(keys)}" if keys else self.place(keys)
        return ConfigError(f"{where}: {message}")

    def override(self, assignment: str, shorthand: Mapping[str, str]) -> None:
        """Apply `a.b=value` to the data; the value is YAML."""
        name, equals, text = assignment.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            raise ConfigError(
                f"--set {assignment}: must be KEY=VALUE, such as sampling.temperature=0.2."
            )
        where = f"--set {assignment}"
        mapping = self.data
        for key in keys[:-1]:
            if key in shorthand and isinstance(mapping.get(key), str):
                mapping[key] = {shorthand[key]: mapping[key]}
            mapping = mapping.setdefault(key, {})
            if not isinstance(mapping, dict):
                raise ConfigError(f"{where}: {key} is not a mapping in {self.name}.")
        mapping[keys[-1]], _ = _parse(text, where)
        self._places = {
            known: place for known, place in self._places.items() if known[: len(keys)] != keys
        }
        for stop in range(1, len(keys) + 1):
            self._places.setdefault(keys[:stop], where)


def dotted(keys: Sequence[str | int]) -> str:
    """Return a key path as users write it, such as `a.b[0]`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return "".join(parts).removeprefix(".")


def read_yaml(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    shorthand: Mapping[str, str] = MappingProxyType({}),
) -> YamlSource:
    """Read the config at `path` and apply the overrides `a.b=value`.

    Args:
      path: a YAML 1.2 file with a mapping at the top.
      overrides: assignments in place of values in the file; their values are YAML.
      shorthand: keys that accept a string for a mapping, with the key that the string belongs to.

    Raises `ConfigError`, with the line, for an unreadable file, invalid YAML, a duplicate key and
    an invalid override.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: invalid UTF-8: {error.reason}.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}. Give the path of a YAML file."
        ) from None
    data, lines = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, such as `model: path`.")
    places = {keys: f"{path}:{line}" for keys, line in lines.items()}
    source = YamlSource(data, str(path), places | {(): str(path)})
    for assignment in overrides:
        source.override(assignment, shorthand)
    return source


class _Constructor(SafeConstructor):
    """Plain data only; dates stay strings, as in the core schema of YAML 1.2."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _parse(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the data in `text` and the line of each value. `name` is for error messages."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        data = yaml.load(text)
        node = YAML(typ="safe", pure=True).compose(text)
        return data, {} if node is None else dict(_lines(node, ()))
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1]
        raise ConfigError(f"{_place(name, error)}: {key} is given twice: keep one.") from None
    except MarkedYAMLError as error:
        problem = error.problem or error.context
        raise ConfigError(f"{_place(name, error)}: invalid YAML: {problem}.") from None
    except RecursionError:
        raise ConfigError(f"{name}: invalid YAML: a value contains itself.") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: invalid YAML: {error}.") from None


def _place(name: str, error: MarkedYAMLError) -> str:
    mark = error.problem_mark
    return name if mark is None else f"{name}:{mark.line + 1}"


def _lines(node: Node, keys: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """Yield the line of each value: the line of its key in a mapping, of the item in a list."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                inner = (*keys, key.value)
                yield inner, key.start_mark.line + 1
                yield from _lines(value, inner)
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            inner = (*keys, number)
            yield inner, value.start_mark.line + 1
            yield from _lines(value, inner)
