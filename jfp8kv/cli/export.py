"""`jfp8kv export`: a model as a Hugging Face folder, with scales for an FP8 cache in the layout that others read."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import quiet_jax
from jfp8kv.cli.output import say
from jfp8kv.core.errors import ConfigError, invalid_choice

if TYPE_CHECKING:
    import jfp8kv.functional


def run(args: argparse.Namespace) -> int:
    """Write the folder and say what it holds; the exit status. What can be refused before the model is read, is."""
    folder = Path(os.path.expanduser(args.folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"FOLDER {args.folder}: exists and is not an empty folder: give another one."
        )
    from jfp8kv.functional import EXPORT_LAYOUTS, KVScales, export, load

    if args.layout not in EXPORT_LAYOUTS:
        raise invalid_choice("--layout", args.layout, EXPORT_LAYOUTS)
    scales = None if args.kv_scales is None else KVScales.load(args.kv_scales)
    quiet_jax()
    params = load(args.model, dtype=args.dtype, strict=not args.lenient)
    export(params, folder, kv_scales=scales, layout=args.layout)
    if not args.quiet:
        say(
            f"wrote {args.folder}: {_held(folder, params, params.kv_scales if scales is None else scales)}"
        )
    return 0


def _held(
    folder: Path, params: "jfp8kv.functional.Params", scales: "jfp8kv.functional.KVScales | None"
) -> str:
    """What the folder holds, in words."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    cache = "no KV scales" if scales is None else f"KV scales per {scales.granularity}"
    return f"{len(list(folder.iterdir()))} files, {size / 1e6:,.1f} MB, weights {params.dtype.name}, {cache}"
