"""`jfp8kv inspect`: what a model is and what its KV cache costs, as tables or as JSON."""

import argparse
import json
import logging
import os

from jfp8kv.cli.output import show


def run(args: argparse.Namespace) -> int:
    """Print the inspection; the exit status."""
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # an accelerator's memory is another program's
    logging.getLogger("jax").setLevel(logging.ERROR)
    from jfp8kv.functional import inspect

    cache = {
        name: getattr(args, name)
        for name in ("kv_dtype", "kv_scales", "max_model_len", "page_size")
    }
    found = inspect(args.model, **cache)
    show(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0
