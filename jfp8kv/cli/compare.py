"""`jfp8kv compare`: what KV caches cost in quality, as tables or as JSON, and as a picture."""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.cli.arguments import add_model, add_options, given, quiet_jax
from jfp8kv.cli.data import check_data, check_field, check_writable, prompts
from jfp8kv.cli.output import say, show
from jfp8kv.core.errors import ConfigError, NotSupported, invalid_choice
from jfp8kv.engine.options import LoadOptions

if TYPE_CHECKING:
    from jfp8kv.quality.quality_report import QualityReport

PICTURES = (".png", ".pdf", ".svg")

SUMMARY = "compare caches by quality"
ABOUT = "Compare KV caches by quality and size, over a text, against a float32 cache."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument(
        "text", metavar="TEXT", help="a text file, or a .jsonl file with a text in each record"
    )
    scales = (
        "of the FP8 ones, by commas: auto, unit, token_head, checkpoint, files of KVScales, or tensor, head, channel, found on "
        "--calibration (default auto,token_head)"
    )

    def option(name, metavar, text, kind=str, **rest):
        parser.add_argument(name, metavar=metavar, type=kind, help=text, **rest)

    dtypes = "bfloat16,fp8_e4m3,fp8_e5m2"
    option(
        "--kv-dtypes",
        "LIST",
        f"formats to compare, or files of KVPlans, by commas (default {dtypes})",
        default=dtypes,
    )
    option("--kv-scales", "LIST", scales, default="auto,token_head")
    option("--calibration", "FILE", "texts to calibrate scales on, as TEXT; not the same ones")
    option(
        "--window",
        "N",
        "cut texts into pieces of N tokens (default: the most that the model takes)",
        int,
    )
    option(
        "--needle-lengths",
        "LIST",
        "tokens of the haystacks, by commas, or none (default 256,1024, if the model takes them)",
    )
    option(
        "--needle-depths",
        "LIST",
        "where the needle is, 0 the beginning, 1 the end, by commas (default 0,0.5,1)",
    )
    option("--field", "NAME", "of a record that holds the text (default: text, prompt or messages)")
    option("--max-model-len", "N", "most tokens of a piece (default: the model's)", int)
    add_options(parser, LoadOptions)
    option("--plot", "FILE", "draw it, too: a .png, .pdf or .svg file")
    parser.add_argument(
        "--by-layer", action="store_true", help="print what is kept layer by layer, too"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--quiet", action="store_true", help="print the result alone: no progress, no remarks"
    )


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    """Compare, print the report and draw it; the exit status."""
    data, calibration = _files(args)
    if args.plot is not None:
        _check_picture(args.plot)
    asked = _asked(args)
    from jfp8kv.functional import load
    from jfp8kv.quality.compare import run_comparison
    from jfp8kv.quality.options import CompareOptions

    options = CompareOptions(**asked)  # invalid options are reported before the model is loaded
    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    began = time.perf_counter()
    report = run_comparison(
        params,
        prompts(args.text, field=args.field, whole=True),
        options,
        calibration=None
        if calibration is None
        else prompts(args.calibration, field=args.field, whole=True),
        progress=False if args.quiet else None,
    )
    _print(report, args)
    if args.plot is not None:
        report.plot().savefig(args.plot, dpi=150)
    if not args.quiet:
        wrote = "" if args.plot is None else f"; wrote {args.plot}"
        say(
            f"{len(report.caches)} caches over {report.tokens:,} tokens in {time.perf_counter() - began:.1f} s{wrote}"
        )
    return 0


def _files(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The texts to compare on and those to calibrate on. Raises `ConfigError` for one that is not there."""
    data, calibration = (
        Path(args.text),
        None if args.calibration is None else Path(args.calibration),
    )
    check_data(args.text, "TEXT")
    if calibration is not None:
        check_data(args.calibration, "--calibration")
    check_field(args.field, args.text, *([args.calibration] if args.calibration else []))
    return data, calibration


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What `jfp8kv.compare` is asked for, what was not given left out."""
    asked = {
        "kv_dtypes": names(args.kv_dtypes),
        "kv_scales": names(args.kv_scales),
        "window": args.window,
        "needle_lengths": _numbers("--needle-lengths", args.needle_lengths, int),
        "needle_depths": _numbers("--needle-depths", args.needle_depths, float),
        "max_model_len": args.max_model_len,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _print(report: "QualityReport", args: argparse.Namespace) -> None:
    if args.json:
        show(json.dumps(report.to_dict(), allow_nan=False))
        return
    show(report)
    if args.by_layer:
        print(f"\n{report.by_layer()}", flush=True)


def _numbers(option: str, given: str | None, kind: type) -> list[Any] | None:
    """Numbers by commas: None for the usual ones, none at all for "none"."""
    if given is None or given == "none":
        return None if given is None else []
    try:
        return [kind(number) for number in names(given)]
    except ValueError:
        usual = "256,1024" if kind is int else "0,0.5,1"
        raise ConfigError(f"{option} {given}: must be numbers, such as {usual}, or none.") from None


def _check_picture(given: str) -> None:
    """Raise unless a picture can be drawn and written there: sooner than after the work."""
    path = Path(given)
    if path.suffix.lower() not in PICTURES:
        raise invalid_choice("--plot", path.suffix, PICTURES)
    check_writable(given, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotSupported(
            "--plot needs matplotlib, which is not installed: pip install 'jfp8kv[notebooks]'."
        )
