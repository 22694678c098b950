"""`jfp8kv batch`: run a file of rows through a model, from a config file."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    from jfp8kv.batch.config import Config
    from jfp8kv.batch.run import Outcome

SUMMARY = "run a file of rows, from a config"
ABOUT = (
    "Run a file of rows through a model, from a config file. The same command resumes a run that "
    "was interrupted."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML file; see configs/batch for examples"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the config, such as sampling.temperature=0.2; may be repeated",
    )
    parser.add_argument(
        "--restart", action="store_true", help="discard the existing output and start over"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and run nothing: count tokens, check the cache, estimate the time",
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the outputs of all shards into one"
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON Schema of configs, for editors"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")


def run(args: argparse.Namespace) -> int:
    """Run a config, and return the exit status."""
    from jfp8kv.batch import check

    if args.print_schema:
        print(json.dumps(check.schema(), indent=2))
        return 0
    if args.config is None:
        raise ConfigError("no config: give a YAML file, such as configs/batch/demo.yaml.")
    config = check.load(Path(args.config), args.set)
    quiet_jax()
    if args.dry_run:
        from jfp8kv.batch.dry_run import dry_run

        report = dry_run(config)
        print(report, flush=True)
        return report.status
    if args.merge:
        return _merge(config, args)
    from jfp8kv.batch.run import RunStopped
    from jfp8kv.batch.run import run as run_batch
    from jfp8kv.batch.view import View

    try:
        outcome = run_batch(config, restart=args.restart, view=View(quiet=args.quiet))
    except RunStopped as error:
        say(f"error: {error}")
        return 1
    if outcome.shown is not None:
        print(outcome.shown, flush=True)
    if not args.quiet:
        say(_summary(outcome))
    return outcome.status


def _merge(config: "Config", args: argparse.Namespace) -> int:
    """Merge the outputs of shards. Return the exit status: 1 if a row in them failed."""
    from jfp8kv.batch.merge import merge
    from jfp8kv.batch.run import Outcome

    outcome = Outcome(Path(config.output.path), merge(config, restart=args.restart))
    if not args.quiet:
        say(_summary(outcome))
    return outcome.status


def _summary(outcome: "Outcome") -> str:
    """Return one line about a finished run."""
    totals = outcome.totals
    failed = f", {totals['failed']:,} of them failed" if totals["failed"] else ""
    rows = f"{totals['rows']:,} rows{failed}"
    if not outcome.worked:
        return (
            f"{outcome.output} is complete: {rows}; nothing is left to do. --restart starts over."
        )
    tokens = f"{totals['prompt_tokens']:,} tokens in, {totals['completion_tokens']:,} out"
    seconds = f"; {outcome.seconds:.1f} s" if outcome.seconds else ""
    return f"{outcome.output}: {rows}; {tokens}{seconds}"
