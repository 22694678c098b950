"""The command line of jfp8kv.

Each command of `COMMANDS` is a module. Results go to stdout and everything else to stderr, so that
a pipe carries results only. The exit status is 0 when all was done, 1 when a run failed in part,
and 2 for a mistake of the user, which is reported in one line.

JAX takes seconds to import, so it is imported only once a model is needed: `--help` and mistakes
answer at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jfp8kv.cli import batch, bench, calibrate, chat, compare, export, generate, inspect, plan
from jfp8kv.cli.arguments import parse
from jfp8kv.cli.output import say
from jfp8kv.core.errors import Jfp8kvError

COMMANDS: dict[str, ModuleType] = {
    "generate": generate,
    "chat": chat,
    "batch": batch,
    "inspect": inspect,
    "calibrate": calibrate,
    "compare": compare,
    "plan": plan,
    "export": export,
    "bench": bench,
}
INTERRUPTED = 130  # the status that shells report for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (None: the arguments of the program) and return its status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hide XLA's log
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args = parse(sys.argv[1:] if argv is None else list(argv), COMMANDS)
            status = COMMANDS[args.command].run(args)
    except SystemExit as done:  # argparse, after --help or --version
        status = int(done.code or 0)
    except Jfp8kvError as error:
        say(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = 1
    except OSError as error:
        if error.filename is None:  # writing a result failed
            say(f"error: {error}")
            status = 1
        else:  # a path that cannot be used
            say(f"error: {error.filename}: {error.strerror}")
            status = 2
    return _flushed(status)


def _flushed(status: int) -> int:
    """Return `status`, or 1 if the reader of stdout is gone.

    stdout is flushed here because the interpreter would report the error on exit.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or 1
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")
