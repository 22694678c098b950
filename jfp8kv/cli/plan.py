"""`jfp8kv plan`: a cache chosen layer by layer, within a budget of bytes or of loss, written for --kv-dtype to take."""

import argparse
import json
import time
from pathlib import Path

from jfp8kv.cli.arguments import add_model, add_options, given, quiet_jax
from jfp8kv.cli.data import check_data, check_field, check_writable, prompts
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.options import LoadOptions

SUMMARY = "choose a cache layer by layer"
ABOUT = "Choose the format and scales of each layer, and write a plan that --kv-dtype reads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument(
        "text", metavar="TEXT", help="a text file, or a .jsonl file with a text in each record"
    )

    def option(name, metavar, text, kind=str, **rest):
        parser.add_argument(name, metavar=metavar, type=kind, help=text, **rest)

    option("--out", "FILE", "where the plan goes (safetensors)", required=True)
    option(
        "--budget",
        "BYTES",
        "the least loss within so many bytes per token: 2048, 2KiB, or 60%% of what bfloat16 takes",
    )
    option(
        "--max-loss",
        "X",
        "or the fewest bytes within so many nats of KL divergence per token, such as 0.01",
        float,
    )
    option(
        "--kv-dtypes",
        "LIST",
        "formats to choose from (default bfloat16,fp8_e4m3)",
        default="bfloat16,fp8_e4m3",
    )
    option("--window", "N", "cut texts into pieces of N tokens (default 512)", int)
    option("--field", "NAME", "of a record that holds the text (default: text, prompt or messages)")
    option(
        "--max-model-len",
        "N",
        "tokens of the longest text that is meant (default: the model's)",
        int,
    )
    add_options(parser, LoadOptions)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--quiet", action="store_true", help="print the plan alone: no progress, no remarks"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, choose, write the plan and print it; the exit status."""
    out = Path(args.out)
    check_field(args.field, args.text)
    check_writable(args.out, "--out")
    check_data(args.text, "TEXT")
    if (args.budget is None) == (args.max_loss is None):
        raise ConfigError(
            "give either --budget (bytes per token) or --max-loss (nats of KL divergence per token)."
        )
    from jfp8kv.core.formats import kv_format
    from jfp8kv.functional import load
    from jfp8kv.quality.mixed_precision import plan_kv

    names = [kv_format(name.strip()).name for name in args.kv_dtypes.split(",")]
    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    began = time.perf_counter()
    plan = plan_kv(
        params,
        prompts(args.text, field=args.field, whole=True),
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
