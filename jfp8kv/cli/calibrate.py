"""`jfp8kv calibrate`: scales for an FP8 cache from a file of prompts or text, written to a file that `--kv-scales` takes."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.data import check, check_field, check_writable, texts
from jfp8kv.cli.output import say

if TYPE_CHECKING:
    import jfp8kv.functional


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the scales and say what they are; the exit status."""
    data, out = Path(args.data), Path(args.out)
    check_field(args.field, data)
    check_writable(out, "--out", args.out)
    check(data, "DATA", args.data)
    from jfp8kv.functional import calibration, calibration_plan, load

    plan = calibration_plan(
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
    params = load(args.model, dtype=args.dtype, strict=not args.lenient)
    began = time.perf_counter()
    done = calibration(
        params,
        texts(data, field=args.field, whole=args.window is not None),
        plan,
        progress=False if args.quiet else None,
    )
    done.scales.save(out)
    summary = _summary(done, plan, args.out)
    print(json.dumps(summary) if args.json else _table(summary), flush=True)
    if not args.quiet:
        say(
            f"{done.tokens:,} tokens of {done.prompts:,} prompts in {time.perf_counter() - began:.1f} s; wrote {args.out}"
        )
    return 0


def _summary(
    done: "jfp8kv.functional.Calibration", plan: "jfp8kv.functional.CalibrationPlan", out: str
) -> dict[str, Any]:
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
    shown = {
        kind: "  ".join(f"{what} {value:.3g}" for what, value in spread.items())
        for kind, spread in kinds.items()
    }
    return "\n".join([head, *(f"  {kind}  {spread}" for kind, spread in shown.items())])
