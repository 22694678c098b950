"""`jfp8kv batch`: a run over a file of rows, from a config file."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    import jfp8kv.batch.config
    import jfp8kv.batch.run


def run(args: argparse.Namespace) -> int:
    """Run a config, or say what is wrong with it; the exit status."""
    from jfp8kv.batch import check

    if args.print_schema:
        print(json.dumps(check.schema(), indent=2))
        return 0
    if args.config is None:
        raise ConfigError(
            "no config: give the path of a YAML file, such as configs/batch/demo.yaml."
        )
    config = check.load(Path(args.config), args.set)
    quiet_jax()
    if args.dry_run:
        from jfp8kv.batch.dry_run import dry_run

        found = dry_run(config)
        print(found, flush=True)
        return found.status
    if args.merge:
        return _merged(config, args)
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


def _merged(config: "jfp8kv.batch.config.Config", args: argparse.Namespace) -> int:
    """Join the outputs of shards; the exit status, 1 when a row of them failed."""
    from jfp8kv.batch.merge import merge
    from jfp8kv.batch.run import Outcome

    outcome = Outcome(Path(config.output.path), merge(config, restart=args.restart))
    if not args.quiet:
        say(_summary(outcome))
    return outcome.status


def _summary(outcome: "jfp8kv.batch.run.Outcome") -> str:
    totals, path = outcome.totals, outcome.output
    failed = f", {totals['failed']:,} of them failed" if totals["failed"] else ""
    tokens = f"{totals['prompt_tokens']:,} tokens in, {totals['completion_tokens']:,} out"
    if not outcome.worked:
        return f"{path} is complete: {totals['rows']:,} rows{failed}; nothing is left to do. --restart makes it anew."
    return f"{path}: {totals['rows']:,} rows{failed}; {tokens}" + (
        f"; {outcome.seconds:.1f} s" if outcome.seconds else ""
    )
