"""`jfp8kv batch`: run a file of rows through a model, from a config file."""

import argparse
import json
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    from jfp8kv.batch import RunResult, Totals

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
        help="check everything and run nothing: rows, tokens, and the size of the cache",
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the outputs of all shards into one"
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON Schema of configs, for editors"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")


def run(args: argparse.Namespace) -> int:
    """Run a config, or report what is wrong with it. Returns the exit status."""
    from jfp8kv import batch

    if args.print_schema:
        print(json.dumps(batch.json_schema(), indent=2))
        return 0
    if args.config is None:
        raise ConfigError(
            "no config: give the path of a YAML file, such as configs/batch/demo.yaml."
        )
    config = batch.load_config(args.config, args.set)
    quiet_jax()
    if args.dry_run:
        report = batch.dry_run(config)
        print(report, flush=True)
        return report.status
    if args.merge:
        totals = batch.merge(config, restart=args.restart)
        if not args.quiet:
            say(_summary(config.output.path, totals))
        return 1 if totals.failed else 0
    try:
        result = batch.run_batch(
            config, restart=args.restart, display=batch.ProgressDisplay(quiet=args.quiet)
        )
    except batch.RunStopped as error:
        say(f"error: {error}")
        return 1
    if result.report is not None:
        print(result.report, flush=True)
    if not args.quiet:
        say(_run_summary(result))
    return result.status


def _run_summary(result: "RunResult") -> str:
    if result.already_complete:
        rows = _rows(result.totals)
        return f"{result.output} is already complete: {rows}. --restart runs it again."
    return f"{_summary(str(result.output), result.totals)}; {result.seconds:.1f} s"


def _summary(output: str, totals: "Totals") -> str:
    return (
        f"{output}: {_rows(totals)}; {totals.prompt_tokens:,} prompt tokens, "
        f"{totals.completion_tokens:,} completion tokens"
    )


def _rows(totals: "Totals") -> str:
    failed = f", {totals.failed:,} failed" if totals.failed else ""
    return f"{totals.rows:,} rows{failed}"
