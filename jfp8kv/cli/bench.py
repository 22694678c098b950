"""`jfp8kv bench`: how fast caches are on the device at hand, side by side, as a table or as JSON."""

import argparse
import json

from jfp8kv.cli.arguments import add_model, add_options, given, quiet_jax
from jfp8kv.cli.output import show
from jfp8kv.engine.options import LoadOptions

SUMMARY = "measure the speed of caches"
ABOUT = "Measure the speed of caches on this device: the same requests through each in turn."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)

    def option(name, metavar, text, kind=str, **rest):
        parser.add_argument(name, metavar=metavar, type=kind, help=text, **rest)

    dtypes = "bfloat16,fp8_e4m3"
    option(
        "--kv-dtypes",
        "LIST",
        f"formats to measure, or files of KVPlans, by commas (default {dtypes})",
        default=dtypes,
    )
    scales = "of the FP8 ones, by commas: auto (default), unit, token_head, checkpoint, or files of KVScales"
    option("--kv-scales", "LIST", scales, default="auto")
    option("--requests", "N", "how many at once (default 8)", int, default=8)
    option("--prompt-tokens", "N", "of each (default 128)", int, default=128)
    option("--output-tokens", "N", "of each (default 64)", int, default=64)
    option("--rounds", "N", "timed ones, of which medians are taken (default 3)", int, default=3)
    option(
        "--kv-cache-memory",
        "SIZE",
        "of each cache, such as 64MiB (default: what it needs for all requests)",
    )
    option("--attention", "NAME", "pallas, xla or reference (default: the fastest that runs here)")
    add_options(parser, LoadOptions)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    from jfp8kv.quality.bench import bench

    quiet_jax()
    report = bench(
        args.model,
        kv_dtypes=names(args.kv_dtypes),
        kv_scales=names(args.kv_scales),
        requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        rounds=args.rounds,
        kv_cache_memory=args.kv_cache_memory,
        attention=args.attention,
        **given(args, LoadOptions),
        progress=False if args.quiet else None,
    )
    show(json.dumps(report.to_dict()) if args.json else report)
    return 0
