"""`jfp8kv compare`: what KV caches cost in quality, as tables or as JSON, and as a picture."""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.cli.arguments import names, quiet_jax
from jfp8kv.cli.data import check, check_field, check_writable, texts
from jfp8kv.cli.output import say, show
from jfp8kv.core.errors import ConfigError, NotSupported, invalid_choice

if TYPE_CHECKING:
    import jfp8kv.functional

PICTURES = (".png", ".pdf", ".svg")


def run(args: argparse.Namespace) -> int:
    """Compare, print the report and draw it; the exit status."""
    data, calibration = _files(args)
    if args.plot is not None:
        _check_picture(args.plot)
    asked = _asked(args)
    from jfp8kv.functional import compare, comparison_plan, load

    comparison_plan(**asked)  # a mistake is said before the model is loaded
    quiet_jax()
    params = load(args.model, dtype=args.dtype, strict=not args.lenient)
    began = time.perf_counter()
    report = compare(
        params,
        texts(data, field=args.field, whole=True),
        calibration=None
        if calibration is None
        else texts(calibration, field=args.field, whole=True),
        progress=False if args.quiet else None,
        **asked,
    )
    _print(report, args)
    if args.plot is not None:
        report.plot().savefig(args.plot, dpi=150)
    if not args.quiet:
        wrote = "" if args.plot is None else f"; wrote {args.plot}"
        say(
            f"{len(report.choices)} caches over {report.tokens:,} tokens in {time.perf_counter() - began:.1f} s{wrote}"
        )
    return 0


def _files(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The texts to compare on and those to calibrate on. Raises `ConfigError` for one that is not there."""
    data, calibration = (
        Path(args.text),
        None if args.calibration is None else Path(args.calibration),
    )
    check(data, "TEXT", args.text)
    if calibration is not None:
        check(calibration, "--calibration", args.calibration)
    check_field(args.field, data, *([calibration] if calibration else []))
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


def _print(report: "jfp8kv.functional.QualityReport", args: argparse.Namespace) -> None:
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
    check_writable(path, "--plot", given)
    if importlib.util.find_spec("matplotlib") is None:
        raise NotSupported(
            "--plot needs matplotlib, which is not installed: pip install 'jfp8kv[notebooks]'."
        )
