"""`jfp8kv plan`: choose the format of each layer within a budget of bytes or of loss."""

import argparse
import json
import time

from jfp8kv.cli.arguments import add_model, add_options, add_quiet, given, quiet_jax
from jfp8kv.cli.data import FIELD_HELP, HELP, check_data, check_field, check_writable, prompts
from jfp8kv.cli.output import say
from jfp8kv.engine.options import LoadOptions
from jfp8kv.quality.options import PlanOptions

SUMMARY = "choose the format of each layer"
ABOUT = "Choose the format and scales of each layer, and write a plan that --kv-dtype reads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument("text", metavar="TEXT", help=HELP)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="the file to write (safetensors)"
    )
    parser.add_argument("--field", metavar="NAME", help=FIELD_HELP)
    add_options(parser.add_argument_group("plan"), PlanOptions)
    add_options(parser.add_argument_group("model"), LoadOptions)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, choose, write the plan, print it, and return the exit status."""
    check_field(args.field, args.text)
    check_writable(args.out, "--out")
    check_data(args.text, "TEXT")
    fields = given(args, PlanOptions)
    PlanOptions(**fields)  # invalid values are refused before the model is loaded
    from jfp8kv.checkpoint.load import load
    from jfp8kv.quality.mixed_precision import plan_kv

    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    start = time.perf_counter()
    texts = prompts(args.text, field=args.field, whole=True)
    plan = plan_kv(params, texts, progress=False if args.quiet else None, **fields)
    plan.save(args.out)
    print(json.dumps(plan.to_dict() | {"out": args.out}) if args.json else plan, flush=True)
    if not args.quiet:
        seconds = time.perf_counter() - start
        say(f"measured in {seconds:.1f} s; wrote {args.out}, for --kv-dtype {args.out}")
    return 0
