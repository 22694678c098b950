"""The command line: `jfp8kv generate`, `chat`, `batch`, `inspect`, `calibrate`, `compare`, `plan`, `export`, `bench`.

Each is in a module of its own. Text goes to stdout and everything else to stderr, so that a pipe carries answers alone. The
exit status is 0 when all was done, 1 when a run failed in part, 2 for a mistake in what was asked, which is said in one line
that names it.

JAX takes seconds to import, so nothing here imports it before a model is needed: `--help` and mistakes answer at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jfp8kv.cli import batch, bench, calibrate, chat, compare, export, generate, inspect, plan
from jfp8kv.cli.arguments import parse
from jfp8kv.cli.output import say
from jfp8kv.core.errors import Jfp8kvError

COMMANDS = {
    "generate": generate.run,
    "chat": chat.run,
    "batch": batch.run,
    "inspect": inspect.run,
    "calibrate": calibrate.run,
    "compare": compare.run,
    "plan": plan.run,
    "export": export.run,
    "bench": bench.run,
}
INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (None: the program's own arguments) and return the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log speaks to its developers
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args = parse(sys.argv[1:] if argv is None else list(argv))
            status = COMMANDS[args.command](args)
    except SystemExit as done:  # argparse, after --help or --version
        status = int(done.code or 0)
    except Jfp8kvError as error:
        say(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = 1
    except OSError as error:  # with a file's name: a path that cannot be used; without: writing what was made failed
        say(f"error: {error if error.filename is None else f'{error.filename}: {error.strerror}'}")
        status = 1 if error.filename is None else 2
    return _flushed(status)


def _flushed(status: int) -> int:
    """`status`, or 1 if the reader of stdout has gone; flushed here, as the interpreter would complain of it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or 1
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")
