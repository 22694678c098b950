"""`jfp8kv inspect`: what a model is and what its KV cache costs, as tables or as JSON."""

import argparse
import json
import logging
import os
import sys


def run(args: argparse.Namespace) -> int:
    """Print the inspection; the exit status. Tables get lines and colours on a terminal alone."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator's memory is another program's
    logging.getLogger("jax").setLevel(logging.ERROR)
    from jfp8kv.api import inspect

    cache = {name: getattr(args, name) for name in ("kv_dtype", "kv_scales", "max_model_len", "page_size")}
    found = inspect(args.model, **cache)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    elif sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        print(found)
    return 0
