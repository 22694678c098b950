"""`jfp8kv calibrate`: compute scales for an FP8 cache from a file of prompts."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from jfp8kv.cli.arguments import add_model, add_options, add_quiet, given, quiet_jax
from jfp8kv.cli.data import FIELD_HELP, HELP, check_data, check_field, check_writable, prompts
from jfp8kv.cli.output import say
from jfp8kv.engine.options import LoadOptions
from jfp8kv.quality.options import CalibrationOptions

if TYPE_CHECKING:
    import numpy as np

    from jfp8kv.quality.calibrate import CalibrationResult

SUMMARY = "compute scales for an FP8 cache"
ABOUT = "Compute scales for an FP8 cache from data, and write a file that --kv-scales reads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    data = f"{HELP}; a line of a text file is a prompt, but with --window the file is one"
    parser.add_argument("data", metavar="DATA", help=data)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="the file to write (safetensors)"
    )
    parser.add_argument("--field", metavar="NAME", help=FIELD_HELP)
    add_options(parser.add_argument_group("calibration"), CalibrationOptions)
    add_options(parser.add_argument_group("model"), LoadOptions)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the scales, print a summary, and return the exit status."""
    check_field(args.field, args.data)
    check_writable(args.out, "--out")
    check_data(args.data, "DATA")
    options = CalibrationOptions(**given(args, CalibrationOptions))
    from jfp8kv.checkpoint.load import load
    from jfp8kv.quality.calibrate import run_calibration

    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    start = time.perf_counter()
    data = prompts(args.data, field=args.field, whole=options.window is not None)
    result = run_calibration(params, data, options, progress=False if args.quiet else None)
    result.scales.save(args.out)
    summary = _summary(result, options, args.out)
    print(json.dumps(summary) if args.json else _table(summary), flush=True)
    if not args.quiet:
        say(
            f"{result.tokens:,} tokens of {result.prompts:,} prompts in "
            f"{time.perf_counter() - start:.1f} s; wrote {args.out}"
        )
    return 0


def _summary(result: "CalibrationResult", options: CalibrationOptions, out: str) -> dict[str, Any]:
    """Return the options and results of a calibration, for --json."""
    scales = result.scales
    summary: dict[str, Any] = {
        "out": out,
        "kv_dtype": options.kv_dtype,
        "granularity": options.granularity,
        "observer": options.observer,
    }
    if options.observer == "percentile":
        summary["percentile"] = options.percent
    summary |= {"prompts": result.prompts, "tokens": result.tokens, "layers": len(scales.k)}
    return summary | {"k": _spread(scales.k), "v": _spread(scales.v)}


def _spread(scale: "np.ndarray") -> dict[str, float]:
    import numpy as np

    return {"min": float(scale.min()), "median": float(np.median(scale)), "max": float(scale.max())}


def _table(summary: dict[str, Any]) -> str:
    """Return the summary in three lines."""
    lines = [
        f"{summary['observer']} scales per {summary['granularity']} for {summary['kv_dtype']}, "
        f"{summary['layers']} layers"
    ]
    for name in ("k", "v"):
        spread = "  ".join(f"{key} {value:.3g}" for key, value in summary[name].items())
        lines.append(f"  {name.upper()}  {spread}")
    return "\n".join(lines)
