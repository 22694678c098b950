"""Merge the outputs of all shards into the output of a run without shards."""

import itertools
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jfp8kv.batch import outputs, parquet
from jfp8kv.batch.config import Config
from jfp8kv.batch.journal import Totals
from jfp8kv.batch.manifest import Manifest, RunFiles, describe_changes, locked
from jfp8kv.core.errors import ConfigError


def merge(config: Config, *, restart: bool = False) -> Totals:
    """Join the outputs of the shards, `OUT.0-of-4.jsonl` and so on, in the order of the input.

    The output gets the manifest of a run without shards.

    Args:
      config: the config of the shards, without `shard` or with the one of any of them.
      restart: replace an existing output.

    Returns the totals of all shards.

    Raises `ConfigError` for a shard that is missing, incomplete or of another run, and for an
    output that exists.
    """
    output = Path(config.output.path)
    files = RunFiles(output)
    with locked(files):
        if output.exists() and not restart:
            raise ConfigError(f"{output}: exists already; pass --restart to replace it.")
        shards = _shards(config)
        manifests = [_manifest(shard) for shard in shards]
        first = manifests[0]
        for shard, manifest in zip(shards[1:], manifests[1:], strict=True):
            changes = describe_changes(
                first["fingerprint"], manifest["fingerprint"], ignore=("shard",)
            )
            if changes:
                raise ConfigError(f"{shard}: belongs to another run than {shards[0]}: {changes}.")
        with outputs.replaced(output) as temporary:
            if outputs.format_of(config) == "parquet":
                parquet.interleave(temporary, shards)
            else:
                _interleave_lines(temporary, shards)
        totals = {
            name: sum(manifest["totals"][name] for manifest in manifests)
            for name in first["totals"]
        }
        whole = first["fingerprint"]["config"] | {"shard": None}
        Manifest(files.manifest, first).save(
            fingerprint=first["fingerprint"] | {"config": whole},
            sessions=[session for manifest in manifests for session in manifest["sessions"]],
            totals=totals,
        )
        return Totals(**totals)


def _shards(config: Config) -> list[Path]:
    """Return the outputs of all shards. Raises `ConfigError` if their number is not clear."""
    output = Path(config.output.path)
    name = re.compile(rf"{re.escape(output.stem)}\.(\d+)-of-(\d+){re.escape(output.suffix)}")
    found = [match for path in output.parent.iterdir() if (match := name.fullmatch(path.name))]
    counts = {int(config.shard[1])} if config.shard else {int(match[2]) for match in found}
    if len(counts) != 1:
        pattern = f"{output.with_suffix('')}.I-of-N{output.suffix}"
        if not counts:
            raise ConfigError(f"{pattern}: no shards found: run each with --set shard=[I,N].")
        several = " and ".join(map(str, sorted(counts)))
        raise ConfigError(
            f"{pattern}: there are outputs of {several} shards: select with --set shard=[0,N]."
        )
    (count,) = counts
    shards = [outputs.shard_path(output, [index, count]) for index in range(count)]
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        done = count - len(missing)
        raise ConfigError(f"{missing[0]}: missing; {done} of {count} shards are finished.")
    return shards


def _manifest(shard: Path) -> dict[str, Any]:
    """Return the manifest of a complete shard."""
    path = RunFiles(shard).manifest
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = manifest["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: cannot be read, so {shard} may be incomplete: run that shard again."
        ) from None
    if not complete:
        raise ConfigError(f"{shard}: is not complete: run that shard again.")
    return manifest


def _interleave_lines(path: Path, shards: Iterable[Path]) -> None:
    """Write one line of each shard in turn, which is the order of the input."""
    with ExitStack() as stack, path.open("wb") as file:
        parts = [stack.enter_context(shard.open("rb")) for shard in shards]
        for lines in itertools.zip_longest(*parts, fillvalue=b""):
            file.writelines(lines)
