"""`jfp8kv plan`: a cache chosen layer by layer, within a budget of bytes or of loss, written for --kv-dtype to take."""

import argparse
import json
import time
from pathlib import Path

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.data import check, check_field, check_writable, texts
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    """Measure, choose, write the plan and print it; the exit status."""
    data, out = Path(args.text), Path(args.out)
    check_field(args.field, data)
    check_writable(out, "--out", args.out)
    check(data, "TEXT", args.text)
    if (args.budget is None) == (args.max_loss is None):
        raise ConfigError(
            "give either --budget (bytes per token) or --max-loss (nats of KL divergence per token)."
        )
    from jfp8kv.core.formats import kv_format
    from jfp8kv.functional import load, plan_kv

    names = [kv_format(name.strip()).name for name in args.kv_dtypes.split(",")]
    quiet_jax()
    params = load(args.model, dtype=args.dtype, strict=not args.lenient)
    began = time.perf_counter()
    plan = plan_kv(
        params,
        texts(data, field=args.field, whole=True),
        budget=args.budget,
        max_loss=args.max_loss,
        kv_dtypes=names,
        window=args.window,
        max_model_len=args.max_model_len,
        progress=False if args.quiet else None,
    )
    plan.save(out)
    print(json.dumps(plan.to_dict() | {"out": args.out}) if args.json else plan, flush=True)
    if not args.quiet:
        say(
            f"measured in {time.perf_counter() - began:.1f} s; wrote {args.out}, for --kv-dtype {args.out}"
        )
    return 0
