"""`jfp8kv calibrate`: scales for an FP8 cache from a file of prompts or text, written to a file that `--kv-scales` takes."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    import jfp8kv.api

FIELDS = ("text", "prompt", "messages")  # of a JSONL record, the first there is


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the scales and say what they are; the exit status."""
    data, out = Path(args.data), Path(args.out)
    if args.field is not None and not _is_jsonl(data):
        raise ConfigError(f"--field {args.field}: belongs to records, in a file that ends in .jsonl; {args.data} is text.")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"--out {args.out}: no file can be written there; give one in a folder that exists.")
    if not data.is_file():
        raise ConfigError(f"{args.data}: no such file. DATA is a text file or a .jsonl file.")
    from jfp8kv.api import calibration, calibration_plan, load

    plan = calibration_plan(
        kv_dtype=args.kv_dtype,
        granularity=args.granularity,
        observer=args.observer,
        percentile=args.percentile,
        window=args.window,
        max_model_len=args.max_model_len,
        k_offset=args.k_offset,
    )
    quiet_jax()
    params = load(args.model, dtype=args.dtype)
    began = time.perf_counter()
    done = calibration(params, _prompts(data, args), plan, progress=False if args.quiet else None)
    done.scales.save(out)
    summary = _summary(done, plan, args.out)
    print(json.dumps(summary) if args.json else _table(summary), flush=True)
    if not args.quiet:
        say(f"{done.tokens:,} tokens of {done.prompts:,} prompts in {time.perf_counter() - began:.1f} s; wrote {args.out}")
    return 0


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _prompts(path: Path, args: argparse.Namespace) -> Iterator[Any]:
    """The prompts of a file, read line by line: a JSONL record each, or a line of text each.

    With --window, a text file is one text, cut where that says.
    """
    try:
        if not _is_jsonl(path) and args.window is not None:
            if text := path.read_bytes().decode("utf-8-sig"):
                yield text
            return
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    line = line.removesuffix("\n").removesuffix("\r")
                    yield _record(line, args.field, f"{path}:{number}") if _is_jsonl(path) else line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error.reason}.") from error


def _record(line: str, field: str | None, where: str) -> Any:
    """The prompt in one JSONL record."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON ({error}).") from error
    wanted = FIELDS if field is None else (field,)
    found = next((name for name in wanted if isinstance(record, dict) and name in record), None)
    if found is None:
        there = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
        raise ConfigError(f"{where}: has no {' or '.join(map(repr, wanted))}, but {there}; name the field with --field.")
    return record[found]


def _summary(done: "jfp8kv.api.Calibration", plan: "jfp8kv.api.CalibrationPlan", out: str) -> dict[str, Any]:
    """What was found, in numbers."""
    scales = done.scales
    about = {"kv_dtype": plan.fmt.name, "granularity": plan.granularity, "observer": plan.observer}
    if plan.observer == "percentile":
        about["percentile"] = plan.percentile
    seen = {"prompts": done.prompts, "tokens": done.tokens, "layers": len(scales.k)}
    return {"out": out} | about | seen | {name: _spread(getattr(scales, name)) for name in "kv"}


def _spread(scale: Any) -> dict[str, float]:
    import numpy as np

    return {"min": float(scale.min()), "median": float(np.median(scale)), "max": float(scale.max())}


def _table(summary: dict[str, Any]) -> str:
    """Three lines for a reader."""
    kinds = {"K": summary["k"], "V": summary["v"]}
    head = f"{summary['observer']} scales per {summary['granularity']} for {summary['kv_dtype']}, {summary['layers']} layers"
    shown = {kind: "  ".join(f"{what} {value:.3g}" for what, value in spread.items()) for kind, spread in kinds.items()}
    return "\n".join([head, *(f"  {kind}  {spread}" for kind, spread in shown.items())])
