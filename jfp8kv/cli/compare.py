"""`jfp8kv compare`: compare KV caches by quality and size, as tables, as JSON or as a figure."""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import add_model, add_options, add_quiet, given, quiet_jax
from jfp8kv.cli.data import FIELD_HELP, HELP, check_data, check_field, check_writable, prompts
from jfp8kv.cli.output import say, show
from jfp8kv.core.errors import NotSupported, invalid_choice
from jfp8kv.engine.options import LoadOptions
from jfp8kv.quality.options import CompareOptions

if TYPE_CHECKING:
    from jfp8kv.quality.quality_report import QualityReport

SUMMARY = "compare caches by quality"
ABOUT = "Compare KV caches by quality and size, over a text, against a float32 cache."
FIGURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument("text", metavar="TEXT", help=HELP)
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="data to calibrate scales on, as TEXT but different from it",
    )
    parser.add_argument("--field", metavar="NAME", help=FIELD_HELP)
    add_options(parser.add_argument_group("comparison"), CompareOptions)
    add_options(parser.add_argument_group("model"), LoadOptions)
    parser.add_argument("--plot", metavar="FILE", help="draw a figure: a .png, .pdf or .svg file")
    parser.add_argument("--by-layer", action="store_true", help="print the errors of each layer")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, draw it, and return the exit status."""
    check_data(args.text, "TEXT")
    files = [args.text]
    if args.calibration is not None:
        check_data(args.calibration, "--calibration")
        files.append(args.calibration)
    check_field(args.field, *files)
    if args.plot is not None:
        _check_figure(args.plot)
    options = CompareOptions(**given(args, CompareOptions))
    from jfp8kv.checkpoint.load import load
    from jfp8kv.quality.compare import run_comparison

    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    start = time.perf_counter()
    texts, *calibration = (prompts(file, field=args.field, whole=True) for file in files)
    report = run_comparison(
        params,
        texts,
        options,
        calibration=calibration[0] if calibration else None,
        progress=False if args.quiet else None,
    )
    _print(report, args)
    if args.plot is not None:
        report.plot().savefig(args.plot, dpi=150)
    if not args.quiet:
        wrote = "" if args.plot is None else f"; wrote {args.plot}"
        say(
            f"{len(report.caches)} caches over {report.tokens:,} tokens in "
            f"{time.perf_counter() - start:.1f} s{wrote}"
        )
    return 0


def _print(report: "QualityReport", args: argparse.Namespace) -> None:
    if args.json:
        show(json.dumps(report.to_dict(), allow_nan=False))
        return
    show(report)
    if args.by_layer:
        print(f"\n{report.by_layer()}", flush=True)


def _check_figure(path: str) -> None:
    """Raise unless a figure can be drawn and written to `path`."""
    suffix = Path(path).suffix.lower()
    if suffix not in FIGURES:
        raise invalid_choice("--plot", suffix, FIGURES)
    check_writable(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotSupported(
            "--plot needs matplotlib, which is not installed: pip install 'jfp8kv[notebooks]'."
        )
