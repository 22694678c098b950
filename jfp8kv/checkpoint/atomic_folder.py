"""Write a folder atomically: into a temporary folder that is then renamed."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jfp8kv.core.errors import CheckpointError


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder that replaces `path` when the block succeeds.

    If the block fails, `path` is unchanged. Parent folders are created. An existing `path` is
    replaced, so the caller must first check that this is allowed.

    Raises:
      CheckpointError: an `OSError` while writing.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_missing_or_empty(path: Path) -> bool:
    """Return whether `path` does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _replace(temporary: Path, path: Path) -> None:
    old = _temporary(path)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)
