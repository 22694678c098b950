"""One process to an output: a lock that the system holds for it and lets go when it ends, however it ends."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jfp8kv.core.errors import ConfigError, NotSupported


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock in the file at `path`, which is there for so long. Raises `ConfigError` if another process holds it, and
    `NotSupported` where nothing can be locked."""
    try:
        import fcntl
    except ImportError:
        raise NotSupported(
            "batch runs need file locks (flock), which this system lacks: run them on Linux or macOS."
        ) from None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ConfigError(
                f"{path}: {holder} is writing this output now: wait for it, or give another output."
            ) from None
        except OSError as error:
            os.close(file)
            raise NotSupported(
                f"{path}: cannot be locked ({error.strerror}): give an output on another file system."
            ) from None
        if _is_file_at(file, path):
            break
        os.close(
            file
        )  # whoever held it has just removed it: what is locked is no longer the file that others see
    try:
        os.ftruncate(file, 0)
        with contextlib.suppress(OSError):  # the disk may be full; then others are not told who
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_file_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
