"""A folder that appears whole or not at all: it is written beside its place and then renamed."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jfp8kv.core.errors import CheckpointError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` at the end. Whatever fails leaves `path` as it was.

    Folders above `path` are made. What is at `path` is replaced: it is for the caller to look there first.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    beside = _beside(path)
    try:
        beside.mkdir(parents=True)
        yield beside
        _move(beside, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_free(path: Path) -> bool:
    """Whether nothing is at `path`, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _move(beside: Path, path: Path) -> None:
    old = _beside(path)
    if path.exists():
        path.rename(old)
    beside.rename(path)
    shutil.rmtree(old, ignore_errors=True)
