"""`jfp8kv export`: write a model as a Hugging Face folder, with KV scales that vLLM reads."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import add_model, add_options, given, quiet_jax
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError, invalid_choice
from jfp8kv.engine.options import LoadOptions

if TYPE_CHECKING:
    from jfp8kv.cache.scales import KVScales
    from jfp8kv.models.params import Params

SUMMARY = "write a Hugging Face folder"
ABOUT = (
    "Write a model as a Hugging Face folder, with the scales of an FP8 cache where vLLM and other "
    "engines read them."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write: new or empty")
    parser.add_argument(
        "--kv-scales",
        metavar="FILE",
        help="KV scales, as calibrate writes them (default: the scales of the model, if any)",
    )
    parser.add_argument(
        "--layout",
        default="compressed-tensors",
        metavar="NAME",
        help="layout of the scales (default: compressed-tensors, of LLM Compressor and vLLM)",
    )
    add_options(parser, LoadOptions)
    parser.add_argument("--quiet", action="store_true", help="print nothing")


def run(args: argparse.Namespace) -> int:
    """Write the folder, and return the exit status."""
    folder = Path(args.folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"FOLDER {args.folder}: exists and is not empty; give another folder.")
    from jfp8kv.cache.scales import KVScales
    from jfp8kv.checkpoint.export import LAYOUTS, export
    from jfp8kv.checkpoint.load import load

    if args.layout not in LAYOUTS:
        raise invalid_choice("--layout", args.layout, LAYOUTS)
    scales = None if args.kv_scales is None else KVScales.load(args.kv_scales)
    quiet_jax()
    params = load(args.model, **given(args, LoadOptions))
    export(params, folder, kv_scales=scales, layout=args.layout)
    if not args.quiet:
        written = params.kv_scales if scales is None else scales
        say(f"wrote {args.folder}: {_contents(folder, params, written)}")
    return 0


def _contents(folder: Path, params: "Params", scales: "KVScales | None") -> str:
    """Return a description of the folder."""
    files = list(folder.iterdir())
    size = sum(file.stat().st_size for file in files)
    cache = "no KV scales" if scales is None else f"KV scales per {scales.granularity}"
    return f"{len(files)} files, {size / 1e6:,.1f} MB, weights {params.dtype.name}, {cache}"
