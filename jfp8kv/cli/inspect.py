"""`jfp8kv inspect`: a model and the cost of its KV cache, as tables or as JSON."""

import argparse
import json
import os

from jfp8kv.cli.arguments import add_model, add_options, given, quiet_jax
from jfp8kv.cli.output import show
from jfp8kv.engine.options import EngineOptions

SUMMARY = "show a model and the cost of its cache"
ABOUT = (
    "Show what a model is, what its KV cache costs in each format, and its KV scales. Reads the "
    "config and the headers, not the weights."
)
CACHE = ("kv_dtype", "kv_scales", "max_model_len", "page_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    add_options(parser.add_argument_group("model and cache"), EngineOptions, only=CACHE)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report, and return the exit status."""
    fields = given(args, EngineOptions)
    EngineOptions(**fields)  # invalid values are refused before JAX is imported
    # Inspecting allocates little: the memory of an accelerator stays free for other programs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    quiet_jax()
    from jfp8kv.quality.model_report import inspect

    report = inspect(args.model, **fields)
    show(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
