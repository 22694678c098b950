"""Arguments of the command line, derived from the option classes.

`add_options` turns the fields of an option class into arguments: the name, the type, the default
and the help come from the field. `given` returns the options that the user gave. Values are checked
when the options are created, so ranges are stated once.
"""

import argparse
import logging
import re
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, NoReturn

import jfp8kv
from jfp8kv.core.errors import ConfigError, did_you_mean, invalid_choice
from jfp8kv.core.options import Options, OptionSpec

ABOUT = "Run language models in JAX with a paged key/value cache in 8-bit floating point."
_METAVARS = {int: "N", float: "X"}


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_NUMBERS: dict[type, Callable[[str], float]] = {int: _whole_number, float: _number}


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a mistake, where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of a mistake that argparse found."""
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


def parse(argv: list[str], commands: Mapping[str, ModuleType]) -> argparse.Namespace:
    """Return the arguments, checked as far as possible without a model.

    Args:
      argv: the words of the command line.
      commands: the module of each command: `SUMMARY` and `ABOUT` describe it, and `add_arguments`
        adds its arguments to a parser.

    Raises:
      ConfigError: a mistake; for an unknown option or command it names the nearest known one.
      SystemExit: after --help and --version.
    """
    for word in argv:
        if any("\ud800" <= character <= "\udfff" for character in word):  # undecodable bytes
            raise ConfigError(f"argument {word!r}: must be UTF-8 text.")
    if argv and argv[0] not in commands and not argv[0].startswith("-"):
        raise invalid_choice("command", argv[0], commands)
    parser = Parser("jfp8kv", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jfp8kv {jfp8kv.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for name, module in commands.items():
        parsers[name] = subparsers.add_parser(
            name, help=module.SUMMARY, description=module.ABOUT, allow_abbrev=False
        )
        module.add_arguments(parsers[name])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], args.command, parsers[args.command])
    return args


def _refuse(word: str, command: str, parser: argparse.ArgumentParser) -> NoReturn:
    """Raise the error of an argument that the command does not have."""
    if not word.startswith("-"):
        raise ConfigError(
            f"unexpected argument {word!r}: quote a text with spaces; prompts need --prompt."
        )
    option = word.partition("=")[0]
    known = re.findall(r"--[a-z0-9-]+", parser.format_usage())
    raise ConfigError(
        f"unknown option {option}.{did_you_mean(option, known)} See `jfp8kv {command} --help`."
    )


# -- options -------------------------------------------------------------------------------------


def add_options(
    parser: argparse._ActionsContainer,
    options: type[Options],
    *,
    only: Collection[str] = (),
    omit: Collection[str] = (),
    repeat: Collection[str] = (),
    defaults: Mapping[str, Any] = {},  # noqa: B006  (read only)
) -> None:
    """Add an argument for each option.

    Args:
      parser: a parser or an argument group.
      options: the option class.
      only: names of the options to add; empty for all of them.
      omit: names of options to leave out.
      repeat: options with several values that are given by repeating the argument. Other lists are
        separated by commas.
      defaults: defaults of this command that differ from those of the class.
    """
    for spec in options.specs():
        if spec.name in omit or (only and spec.name not in only):
            continue
        default = defaults.get(spec.name, spec.default)
        help = _help(spec, default, repeated=spec.name in repeat)
        name = spec.name.replace("_", "-")
        if spec.types == (bool,):
            action = argparse.BooleanOptionalAction if spec.default else "store_true"
            parser.add_argument(f"--{name}", action=action, default=argparse.SUPPRESS, help=help)
        elif spec.name in repeat:
            parser.add_argument(
                f"--{name}", action="append", default=argparse.SUPPRESS, metavar="TEXT", help=help
            )
        else:
            initial = defaults.get(spec.name, argparse.SUPPRESS)
            kind = next((kind for kind in _METAVARS if spec.types == (kind,)), str)
            metavar = "LIST" if _is_list(spec) else _METAVARS.get(kind)
            parser.add_argument(
                f"--{name}",
                type=_NUMBERS.get(kind, kind),
                default=initial,
                metavar=metavar,
                help=help,
            )


def _is_list(spec: OptionSpec) -> bool:
    """Return whether an option has several values, which are separated by commas."""
    return spec.is_sequence or isinstance(spec.default, tuple)


def _help(spec: OptionSpec, default: Any, *, repeated: bool) -> str:
    """Return the help of an argument: that of the option, how to give it, values and default."""
    text = spec.help
    if repeated:
        text = f"{text} May be repeated."
    elif _is_list(spec):
        text = f"{text} Items are separated by commas."
    elif spec.choices:
        text = f"{text} Values: {', '.join(map(str, spec.choices))}."
    if default is True:
        text = f"{text} On by default."
    elif default is not False and default not in (None, ()):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text} Default: {shown}."
    return text.replace("`", "").replace("%", "%%")


def given(args: argparse.Namespace, options: type[Options]) -> dict[str, Any]:
    """Return the options of a class that were given on the command line, by name."""
    values = {}
    for spec in options.specs():
        if hasattr(args, spec.name):
            value = getattr(args, spec.name)
            words = _is_list(spec) and isinstance(value, str)
            values[spec.name] = _items(spec, value) if words else value
    return values


def _items(spec: OptionSpec, text: str) -> list[Any]:
    """Return the items of a list that is separated by commas; none for "none"."""
    kind = spec.element if spec.element in _METAVARS else str
    words = [] if text == "none" else [word.strip() for word in text.split(",") if word.strip()]
    try:
        return [kind(word) for word in words]
    except ValueError:
        flag = spec.name.replace("_", "-")
        raise ConfigError(
            f"--{flag} {text}: must be numbers separated by commas, or none."
        ) from None


# -- arguments that several commands have ---------------------------------------------------------


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument MODEL."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )


def add_quiet(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Add --quiet, and --json unless the command has no result to print."""
    if json:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--quiet", action="store_true", help="print the result only: no progress, no statistics"
    )


def quiet_jax() -> None:
    """Hide JAX's log messages below errors, which address its developers."""
    logging.getLogger("jax").setLevel(logging.ERROR)
