"""The outputs of all shards of a run as the output that the run would have had."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from jfp8kv.batch import outputs
from jfp8kv.batch.config import Config, File
from jfp8kv.batch.inputs import Reader
from jfp8kv.batch.lock import locked
from jfp8kv.batch.record import Paths, Record, differences
from jfp8kv.core.errors import ConfigError


def merge(config: Config, *, restart: bool = False) -> dict[str, int]:
    """Join the outputs of the shards of `config` in the order of the input's rows; totals of all.

    Shards are found by their names, `OUT.0-of-4.jsonl` and so on. Raises `ConfigError` for one that is missing, not complete,
    or of another run than the others, and for an output that is there already unless `restart` replaces it. The record of the
    output is that of one run.
    """
    output = Path(config.output.path)
    with locked(Paths(output).lock):
        if output.exists() and not restart:
            raise ConfigError(f"{output}: is there already: --restart replaces it.")
        shards = _shards(config)
        records = [_record(shard) for shard in shards]
        for shard, record in zip(shards[1:], records[1:], strict=True):
            if changed := differences(records[0]["same"], record["same"], but=("shard",)):
                raise ConfigError(f"{shard}: is not of the run of {shards[0]}: {changed}.")
        form = outputs.format_of(config)
        with ExitStack() as stack:
            parts = [stack.enter_context(closing(_rows(shard, form))) for shard in shards]
            outputs.write(output, _by_turns(parts), form, like=config.input)
        totals = {
            name: sum(record["totals"][name] for record in records) for name in records[0]["totals"]
        }
        same = records[0]["same"] | {"config": records[0]["same"]["config"] | {"shard": None}}
        sessions = [each for record in records for each in record["sessions"]]
        Record(
            Paths(output).record,
            records[0] | {"same": same, "sessions": sessions, "totals": totals},
        ).save()
        return totals


def _shards(config: Config) -> list[Path]:
    """The outputs of all shards. Raises `ConfigError` if there are none, of two runs, or if one is missing."""
    output = Path(config.output.path)
    name = re.compile(rf"{re.escape(output.stem)}\.(\d+)-of-(\d+){re.escape(output.suffix)}")
    found = [match for path in output.parent.iterdir() if (match := name.fullmatch(path.name))]
    counts = {int(config.shard[1])} if config.shard else {int(match[2]) for match in found}
    if len(counts) != 1:
        several = f"are outputs of {' and of '.join(map(str, sorted(counts)))} shards: say which with --set shard=[0,N]"
        none = "is no output of a shard: run each with --set shard=[I,N] before"
        raise ConfigError(
            f"{output.with_suffix('')}.I-of-N{output.suffix}: there {several if counts else none}."
        )
    (count,) = counts
    shards = [outputs.shard_path(output, [i, count]) for i in range(count)]
    if missing := [shard for shard in shards if not shard.exists()]:
        raise ConfigError(
            f"{missing[0]}: is not there; {count - len(missing)} of {count} shards are finished."
        )
    return shards


def _record(shard: Path) -> dict[str, Any]:
    path = Paths(shard).record
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{path}: cannot be read, so nobody knows whether {shard} is whole: run that shard again."
        ) from None
    if record["status"] != "complete":
        raise ConfigError(f"{shard}: is not complete: run that shard again.")
    return record


def _rows(shard: Path, form: str) -> Iterator[bytes]:
    """The rows of one output, encoded."""
    if form == "parquet":
        yield from (
            outputs.line(row.fields()) for row in Reader(File(path=str(shard), format="parquet"))
        )
        return
    with shard.open("rb") as lines:
        yield from (line.removesuffix(b"\n") for line in lines)


def _by_turns(parts: list[Iterator[bytes]]) -> Iterator[bytes]:
    """A row of each in turn, as the shards took them from the input."""
    for turn in itertools.zip_longest(*parts):
        yield from (row for row in turn if row is not None)
