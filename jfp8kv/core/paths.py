"""Distinguish names from paths, for arguments that accept both."""

import os
import typing
from pathlib import Path


def looks_like_path(value: object) -> typing.TypeGuard[str | os.PathLike[str]]:
    """Return whether `value` is a path: an `os.PathLike`, or a string with a separator or suffix.

    A bare word such as "fp8" is never a path, so a file of that name in the working directory
    changes nothing. Write "./fp8" for the file.
    """
    if isinstance(value, str):
        separators = [os.path.sep, *filter(None, [os.path.altsep])]
        return any(sep in value for sep in separators) or bool(Path(value).suffix)
    return isinstance(value, os.PathLike)
