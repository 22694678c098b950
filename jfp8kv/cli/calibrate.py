"""`jfp8kv calibrate`: scales for an FP8 cache from a file of prompts or text, written to a file that `--kv-scales` takes."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.cli.arguments import add_model, add_options, given, quiet_jax
from jfp8kv.cli.data import check_data, check_field, check_writable, prompts
from jfp8kv.cli.output import say
from jfp8kv.engine.options import LoadOptions

if TYPE_CHECKING:
    from jfp8kv.quality.calibrate import CalibrationResult
    from jfp8kv.quality.options import CalibrationOptions

SUMMARY = "compute scales for an FP8 cache"
ABOUT = "Compute scales for an FP8 cache from data, and write a file that --kv-scales reads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    data = "a text file with a prompt on each line, or a .jsonl file with a prompt in each record"
    parser.add_argument("data", metavar="DATA", help=data)

    def option(name, metavar, text, kind=str, **rest):
        parser.add_argument(name, metavar=metavar, type=kind, help=text, **rest)

    option("--out", "FILE", "where the scales go (safetensors)", required=True)
    option("--kv-dtype", "DTYPE", "fp8_e4m3 (or fp8, default) or fp8_e5m2", default="fp8_e4m3")
    option(
        "--granularity",
        "WHAT",
        "what shares a scale: tensor, head (default) or channel",
        default="head",
    )
    option("--observer", "NAME", "amax (default), percentile or mse", default="amax")
    option(
        "--percentile",
        "X",
        "of magnitudes that need no clipping (default 99.99), for --observer percentile",
        float,
    )
    parser.add_argument(
        "--k-offset",
        action="store_true",
        help="store keys less a constant: for models with large K biases",
    )
    option(
        "--headroom",
        "X",
        "times the largest value seen that scales hold (default 1), for amax",
        float,
        default=1.0,
    )
    option(
        "--window",
        "N",
        "cut prompts into pieces of N tokens; a text file is then one text, not a prompt a line",
        int,
    )
    option(
        "--field", "NAME", "of a record that holds the prompt (default: text, prompt or messages)"
    )
    option("--max-model-len", "N", "most tokens of a prompt (default: the model's)", int)
    add_options(parser, LoadOptions)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument(
        "--quiet", action="store_true", help="print the summary alone: no progress, no remarks"
    )


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the scales and say what they are; the exit status."""
    out = Path(args.out)
    check_field(args.field, args.data)
    check_writable(args.out, "--out")
    check_data(args.data, "DATA")
    from jfp8kv.functional import load
    from jfp8kv.quality.calibrate import run_calibration
    from jfp8kv.quality.options import CalibrationOptions

    options = CalibrationOptions(
        kv_dtype=args.kv_dtype,
        granularity=args.granularity,
        observer=args.observer,
        percentile=args.percentile,
        window=args.window,
        max_model_len=args.max_model_len,
        k_offset=args.k_offset,
        headroom=args.headroom,
    )
    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    began = time.perf_counter()
    done = run_calibration(
        params,
        prompts(args.data, field=args.field, whole=args.window is not None),
        options,
        progress=False if args.quiet else None,
    )
    done.scales.save(out)
    summary = _summary(done, options, args.out)
    print(json.dumps(summary) if args.json else _table(summary), flush=True)
    if not args.quiet:
        say(
            f"{done.tokens:,} tokens of {done.prompts:,} prompts in {time.perf_counter() - began:.1f} s; wrote {args.out}"
        )
    return 0


def _summary(done: "CalibrationResult", options: "CalibrationOptions", out: str) -> dict[str, Any]:
    """What was found, in numbers."""
    scales = done.scales
    about = {
        "kv_dtype": options.kv_dtype,
        "granularity": options.granularity,
        "observer": options.observer,
    }
    if options.observer == "percentile":
        about["percentile"] = options.percent
    seen = {"prompts": done.prompts, "tokens": done.tokens, "layers": len(scales.k)}
    return {"out": out} | about | seen | {name: _spread(getattr(scales, name)) for name in "kv"}


def _spread(scale: Any) -> dict[str, float]:
    import numpy as np

    return {"min": float(scale.min()), "median": float(np.median(scale)), "max": float(scale.max())}


def _table(summary: dict[str, Any]) -> str:
    """Three lines for a reader."""
    kinds = {"K": summary["k"], "V": summary["v"]}
    head = f"{summary['observer']} scales per {summary['granularity']} for {summary['kv_dtype']}, {summary['layers']} layers"
    shown = {
        kind: "  ".join(f"{what} {value:.3g}" for what, value in spread.items())
        for kind, spread in kinds.items()
    }
    return "\n".join([head, *(f"  {kind}  {spread}" for kind, spread in shown.items())])
