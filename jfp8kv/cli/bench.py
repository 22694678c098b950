"""`jfp8kv bench`: how fast caches are on the device at hand, side by side, as a table or as JSON."""

import argparse
import json

from jfp8kv.cli.arguments import names, quiet_jax
from jfp8kv.cli.output import show


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    from jfp8kv.functional import bench

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
        dtype=args.dtype,
        strict=not args.lenient,
        progress=False if args.quiet else None,
    )
    show(json.dumps(report.to_dict()) if args.json else report)
    return 0
