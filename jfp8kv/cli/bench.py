"""`jfp8kv bench`: measure the speed of KV caches on this device, as a table or as JSON."""

import argparse
import json

from jfp8kv.cli.arguments import add_model, add_options, add_quiet, given, quiet_jax
from jfp8kv.cli.output import show
from jfp8kv.engine.options import LoadOptions
from jfp8kv.quality.options import BenchOptions

SUMMARY = "measure the speed of caches"
ABOUT = "Measure the speed of KV caches on this device: each serves the same requests in turn."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    add_options(parser.add_argument_group("benchmark"), BenchOptions)
    add_options(parser.add_argument_group("model"), LoadOptions)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the report, and return the exit status."""
    fields = given(args, BenchOptions)
    BenchOptions(**fields)  # invalid values are refused before JAX is imported
    from jfp8kv.checkpoint.load import load
    from jfp8kv.quality.bench import bench

    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    report = bench(params, progress=False if args.quiet else None, **fields)
    show(json.dumps(report.to_dict()) if args.json else report)
    return 0
