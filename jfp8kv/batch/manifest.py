"""`OUT.run.json`: the fingerprint of a run, so that only the same run resumes, and its results."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jfp8kv.batch.config import CalibrateFirst, Config
from jfp8kv.core.errors import ConfigError, NotSupported

# Keys that may change when a run resumes, because no output depends on them. An input is compared
# by its contents, and the manifest is found by the name of the output.
MAY_CHANGE = (
    "engine.kv_cache_memory",
    "engine.max_num_seqs",
    "engine.max_num_batched_tokens",
    "engine.prefix_caching",
    "input.path",
    "output.path",
    "runner",
    "ray",
)
# Keys that may change until the output is written.
OUTPUT_KEYS = ("output.format", "output.unordered")
PACKAGES = ("jfp8kv", "jax", "jaxlib", "flax", "numpy", "pydantic")
MAX_CHANGES_SHOWN = 5
# The digest of a model file covers evenly spaced samples.
SAMPLES = 64
SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, named after its output."""

    output: Path

    @property
    def partial(self) -> Path:
        """The journal."""
        return self._beside("partial")

    @property
    def manifest(self) -> Path:
        """The manifest."""
        return self._beside("run.json")

    @property
    def lock(self) -> Path:
        """The lock file of a running process."""
        return self._beside("lock")

    @property
    def scales(self) -> Path:
        """Scales that are calibrated before the run."""
        return self._beside("scales.safetensors")

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{suffix}")


@contextlib.contextmanager
def locked(files: RunFiles) -> Iterator[None]:
    """Lock an output for this process. The lock is released when the process ends or is killed.

    Raises:
      ConfigError: another process has the lock.
      NotSupported: the file system has no locks.
    """
    lock = FileLock(files.lock)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{files.lock}: {_owner(files.manifest)} is writing this output: wait for it, or give "
            "another output."
        ) from None
    except OSError as error:
        raise NotSupported(
            f"{files.lock}: cannot be locked ({error.strerror}): give an output on another file "
            "system."
        ) from None
    try:
        yield
    finally:
        files.lock.unlink(missing_ok=True)  # before the release: no other process has the lock yet
        lock.release()


def _owner(manifest: Path) -> str:
    """Return the process of the latest session of a run, for an error message."""
    try:
        session = json.loads(manifest.read_text(encoding="utf-8"))["sessions"][-1]
        return f"process {session['process']} on {session['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


class Manifest:
    """The manifest of a run. `data` is the content of the file."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path = path
        self.data = data

    @property
    def complete(self) -> bool:
        """Whether the output is written."""
        return bool(self.data["status"] == "complete")

    @property
    def created(self) -> int:
        """The start of the first session of the run, in Unix seconds."""
        return int(self.data["created"])

    def save(self, **changes: Any) -> None:
        """Apply changes and replace the file atomically. Raises `OSError` with its name."""
        self.data |= changes
        temporary = self.path.with_name(self.path.name + ".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(self.data, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def open_manifest(config: Config, files: RunFiles, *, restart: bool = False) -> Manifest:
    """Return the manifest of a run: a new one, or the one of a run to resume or that is complete.

    Args:
      config: the config of the run.
      files: its files.
      restart: discard earlier sessions, and replace any output.

    Raises `ConfigError` for an output that another program wrote, or that belongs to a run with
    another config, input or model, with the changes.
    """
    now = fingerprint(config, files)
    if not restart and (files.manifest.exists() or files.partial.exists()):
        manifest = _read(files)
        if manifest.complete or _size(files.partial):
            _check_same_run(files, manifest, now)
            return manifest
    elif not restart and files.output.exists():
        raise ConfigError(
            f"{files.output}: exists and was not written by jfp8kv batch; pass --restart to "
            "replace it."
        )
    for path in (files.partial, files.manifest, files.scales):
        path.unlink(missing_ok=True)
    started = time.time()
    manifest = Manifest(
        files.manifest,
        {
            "status": "running",
            "created": int(started),
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "fingerprint": now,
            "seed": config.seed,
            "versions": _versions(),
            "sessions": [],
            "totals": {},
        },
    )
    manifest.save()
    return manifest


def new_session() -> dict[str, Any]:
    """Return the entry of this process in the sessions of a run."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": sys.argv,
    }


def _read(files: RunFiles) -> Manifest:
    try:
        data = json.loads(files.manifest.read_text(encoding="utf-8"))
        required = {name: data[name] for name in ("status", "fingerprint", "sessions", "created")}
        return Manifest(files.manifest, data | required)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{files.manifest}: cannot be read, so {files.partial} cannot be resumed: pass "
            "--restart to discard it."
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_same_run(files: RunFiles, manifest: Manifest, now: dict[str, Any]) -> None:
    """Raise `ConfigError` unless a run may resume, or is complete."""
    if manifest.complete and not files.output.exists():
        raise ConfigError(
            f"{files.output}: missing, although its run is complete: restore it, or pass --restart "
            "to run again."
        )
    ignore = () if manifest.complete else OUTPUT_KEYS
    changes = describe_changes(manifest.data["fingerprint"], now, ignore=ignore)
    if changes:
        raise ConfigError(
            f"{files.output}: belongs to a run with other settings: {changes}. Undo that, give "
            "another output, or pass --restart to discard that run."
        )


# -- fingerprint -----------------------------------------------------------------------------------


def fingerprint(config: Config, files: RunFiles) -> dict[str, Any]:
    """Return everything that the output depends on, as JSON values.

    This is the config, digests of the input and of files that the config names, and digests of
    samples of the model files.
    """
    named: list[str] = [*config.comparison.kv_scales, *config.comparison.kv_dtypes]
    if isinstance(config.kv_dtype, str):
        named.append(config.kv_dtype)
    if isinstance(config.kv_scales, str):
        named.append(config.kv_scales)
    elif isinstance(config.kv_scales, CalibrateFirst):
        named.append(config.kv_scales.calibrate.input.path)
    if config.comparison.calibration is not None:
        named.append(config.comparison.calibration.path)
    existing = sorted({name for name in named if Path(name).is_file()})
    found = {
        "config": config.model_dump(),
        "input": {"format": config.input.row_format} | _digest(Path(config.input.path)),
        "files": {name: _digest(Path(name)) for name in existing},
        "model": dict(_model_files(Path(config.model).expanduser(), files.output.name)),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(found))
    return as_json


def check_input_unchanged(config: Config, manifest: Manifest) -> None:
    """Raise `ConfigError` if a Parquet input, whose columns are copied, is not that of the start.

    The rows of other inputs are in the journal.
    """
    if config.input.row_format != "parquet":
        return
    path = Path(config.input.path)
    before = manifest.data["fingerprint"]["input"]
    if before["sha256"] != _digest(path)["sha256"]:
        raise ConfigError(f"{path}: has changed since the run started: restore it")


def describe_changes(
    before: dict[str, Any], now: dict[str, Any], *, ignore: tuple[str, ...] = ()
) -> str:
    """Return the changes between two fingerprints in words; empty if a run may resume.

    Args:
      before, now: the fingerprints.
      ignore: keys of the config that may differ, besides `MAY_CHANGE`.
    """
    allowed = {*MAY_CHANGE, *ignore}
    changes = []
    for key, old, new in _changes(before, now):
        name = key.removeprefix("config.")
        if name not in allowed and name.split(".")[0] not in allowed:
            changes.append(f"{key} was {json.dumps(old)}, is {json.dumps(new)}")
    if len(changes) > MAX_CHANGES_SHOWN:
        more = len(changes) - MAX_CHANGES_SHOWN
        changes = [*changes[:MAX_CHANGES_SHOWN], f"and {more} more"]
    return "; ".join(changes)


def _changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}".removeprefix("."))
    elif old != new:
        yield key, old, new


def _digest(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": path.stat().st_size, "sha256": digest}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None


def _model_files(model: Path, output: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield digests of the model files, except hidden ones and those of the run; none for the hub.

    The output of a run may be in the folder of its model.
    """
    if model.is_file():
        yield model.name, _sampled_digest(model)
    elif model.is_dir():
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            name = path.relative_to(model).as_posix()
            if "/." not in f"/{name}" and not path.name.startswith(output):
                yield name, _sampled_digest(path)


def _sampled_digest(path: Path) -> dict[str, Any]:
    """Return the size of a file and a digest of samples of it.

    Training changes weights everywhere, so samples suffice, and the time does not grow with size.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "sha256_of_samples": digest.hexdigest()}


def _versions() -> dict[str, str | None]:
    """Return the versions of Python and the packages; None for one without metadata."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
