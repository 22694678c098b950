"""`OUT.run.json`: what a run is made of, so that it goes on only as the same run, and what became of it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jfp8kv.batch.config import Config
from jfp8kv.batch.inputs import format_of
from jfp8kv.core.errors import ConfigError

# What may differ when a run goes on, as no text depends on it: limits, names of files (an input is compared by its bytes, and
# the record lies beside the output), who runs it, and what the output is made like in the end.
MAY_DIFFER = (
    *(
        "engine.kv_cache_memory",
        "engine.max_num_seqs",
        "engine.max_num_batched_tokens",
        "engine.prefix_caching",
    ),
    *("input.path", "output.path", "runner", "ray"),
)
IN_THE_END = ("output.format", "output.unordered")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pydantic")
SHOWN = 5  # changes named in an error
PIECE, PIECES = (
    2**16,
    64,
)  # bytes, and how many of them tell a model's file from another of its size


@dataclasses.dataclass(frozen=True)
class Paths:
    """The files of a run, named after its output."""

    output: Path

    def beside(self, what: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{what}")

    @property
    def partial(self) -> Path:
        return self.beside("partial")

    @property
    def record(self) -> Path:
        return self.beside("run.json")

    @property
    def lock(self) -> Path:
        return self.beside("lock")

    @property
    def scales(self) -> Path:
        return self.beside("scales.safetensors")


class Record:
    """The record of a run, on the disk whenever `save` returns. `data` is what is in it."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path = path
        self.data = data

    @property
    def complete(self) -> bool:
        return self.data["status"] == "complete"

    @property
    def created(self) -> int:
        """When the run began, in Unix seconds: the first time, however often it went on."""
        return self.data["created"]

    def save(self, **changes: Any) -> None:
        """Write it, with these changes, so that whoever reads it finds the old or the new. Raises `OSError` with its name."""
        self.data |= changes
        beside = self.path.with_name(self.path.name + ".new")
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump(self.data, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def begin(config: Config, paths: Paths, *, restart: bool = False) -> Record:
    """The record of a run that begins, goes on, or is complete.

    Raises `ConfigError` when there is something at the output that this run did not make, or made under another config or from
    another input, with what changed; `restart` begins anew, whatever there is.
    """
    same = fingerprint(config, paths)
    if not restart and (paths.record.exists() or paths.partial.exists()):
        before = _before(paths)
        if before.complete or _bytes(paths.partial):
            _check_same(paths, before, same)
            return before
    elif not restart and paths.output.exists():
        raise ConfigError(
            f"{paths.output}: is there already, and no run made it: --restart replaces it."
        )
    for path in (paths.partial, paths.record, paths.scales):
        path.unlink(missing_ok=True)
    now = time.time()
    made = Record(
        paths.record,
        {
            "status": "running",
            "created": int(now),
            "started": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            "same": same,
            "seed": config.seed,
            "versions": _versions(),
            "commit": _commit(),
            "sessions": [],
            "totals": {},
        },
    )
    made.save()
    return made


def _before(paths: Paths) -> Record:
    """The record that there is."""
    try:
        data = json.loads(paths.record.read_text(encoding="utf-8"))
        return Record(paths.record, {"status": data["status"], "same": data["same"]} | data)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{paths.record}: cannot be read, so nobody knows what {paths.partial} is of: --restart begins anew."
        ) from None


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_same(paths: Paths, before: Record, now: dict[str, Any]) -> None:
    """Raise unless a run may go on as it is now, or is complete."""
    if before.complete and not paths.output.exists():
        raise ConfigError(
            f"{paths.output}: is not there, and was complete: put it back, or make it anew with --restart."
        )
    if changed := differences(before.data["same"], now, but=() if before.complete else IN_THE_END):
        raise ConfigError(
            f"{paths.output}: belongs to a run that was not the same: {changed}. Undo that, give another output, or begin anew "
            "with --restart."
        )


def differences(before: dict[str, Any], now: dict[str, Any], *, but: tuple[str, ...] = ()) -> str:
    """In what two runs differ, in words: nothing if they are the same, `but` for keys of the config that may differ."""
    changes = [
        f"{key} was {json.dumps(old)}, is {json.dumps(new)}"
        for key, old, new in _changes(before, now)
        if not {name := key.removeprefix("config."), name.split(".")[0]} & {*MAY_DIFFER, *but}
    ]
    return "; ".join(changes[:SHOWN]) + (
        f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    )


def session() -> dict[str, Any]:
    """This process's part in a run."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "started": started,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": sys.argv,
    }


# -- what a run must be the same in ------------------------------------------------------------------------------------------


def fingerprint(config: Config, paths: Paths) -> dict[str, Any]:
    """All that texts depend on: the config, the bytes of the input and of files that it names, pieces of the model's; as JSON
    gives it back."""
    named = [
        config.kv_dtype,
        config.kv_scales,
        *config.comparison.kv_scales,
        *config.comparison.kv_dtypes,
    ]
    others = [getattr(config.comparison.calibration, "path", None)]
    if not isinstance(config.kv_scales, str):
        others.append(config.kv_scales.calibrate.input.path)
    files = [name for name in (*named, *others) if isinstance(name, str) and Path(name).is_file()]
    found = {
        "config": config.model_dump(),
        "input": {"format": format_of(config.input)} | _content(Path(config.input.path)),
        "files": {name: _content(Path(name)) for name in sorted(files)},
        "model": dict(_model_files(Path(config.model).expanduser(), paths.output.name)),
    }
    return json.loads(json.dumps(found))


def _content(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None


def _model_files(model: Path, output: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What tells a model's files from others, without hidden ones and those of the run; nothing for one from the hub."""
    if model.is_file():
        yield model.name, _pieces(model)
    elif model.is_dir():
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            name = path.relative_to(model).as_posix()
            if "/." not in f"/{name}" and not path.name.startswith(output):
                yield name, _pieces(path)


def _pieces(path: Path) -> dict[str, Any]:
    """Bytes of a file, and a digest of pieces all over it: training changes all of them, and terabytes take no time."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for at in range(0, size, max(PIECE, size // PIECES)):
            file.seek(at)
            digest.update(file.read(PIECE))
    return {"bytes": size, "sha256_of_pieces": digest.hexdigest()}


def _changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys, as users write them, whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}".removeprefix("."))
    elif old != new:
        yield key, old, new


# -- where it ran -----------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jfp8kv": sys.modules["jfp8kv"].__version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def _commit() -> str | None:
    """The commit of the checkout that this library is in, "+" after it if anything was changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        run = {"capture_output": True, "text": True, "timeout": 10}
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], **run, check=True
        ).stdout.split("\n")
        if Path(top[0]) != Path(git[2]):
            return None
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], **run, check=True
        ).stdout.strip()
        return top[1] + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
