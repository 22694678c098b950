"""Recognize files that are not what their name says, by their first bytes.

Downloads leave pointers, web pages and partial files under the name of another file. The error of
a reader names them, with what to do.
"""

from pathlib import Path

from jfp8kv.core.errors import CheckpointError

PICKLE_ADVICE = (
    "pickle files can run code when they are read, so they are not supported. Convert them where "
    "you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) of "
    "transformers writes safetensors."
)
_HEAD_BYTES = 2048
_DOWNLOAD = "download the file again, for example with `hf download`"
_LFS = (
    f"a Git LFS pointer, not the file itself: run `git lfs pull` in the repository, or {_DOWNLOAD}"
)
_ANNEX = "a git-annex pointer, not the file itself: run `git annex get` in the repository"
_WEB_PAGE = (
    "a web page (HTML), such as an error or login page of a server: use the download link of the "
    f"file ('resolve', not 'blob', on the hub), or {_DOWNLOAD}"
)
_XML = f"an XML document, such as the error message of a server: {_DOWNLOAD}"
_OLD_GGML = "a GGML file from before GGUF: convert the original model to GGUF with llama.cpp"
_COMPRESSED = "a compressed file: unpack it first"
# By the first bytes of the file.
_POINTERS: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": _LFS,
    b"version https://hawser.github.com/spec/": _LFS,  # the name of Git LFS before its release
    b"/annex/objects/": _ANNEX,
}
_FORMATS: dict[bytes, str] = {
    b"GGUF": "a GGUF file: rename it to .gguf and load that file",
    b"ggml": _OLD_GGML,
    b"lmgg": _OLD_GGML,
    b"fmgg": _OLD_GGML,
    b"tjgg": _OLD_GGML,
    b"\x89HDF": "an HDF5 file, as Keras writes it: convert the model to safetensors",
    b"\x93NUMPY": "a NumPy array: convert the model to safetensors",
    b"\x1f\x8b": _COMPRESSED,
    b"BZh": _COMPRESSED,
    b"\xfd7zXZ": _COMPRESSED,
    b"\x28\xb5\x2f\xfd": _COMPRESSED,
    b"7z\xbc\xaf": _COMPRESSED,
}


def describe_file(path: Path) -> str | None:
    """Return what a file is and what to do, by its first bytes; None if it is not recognized.

    For files that their reader refuses: "a Git LFS pointer, not the file itself: run ...".
    """
    head = _head(path)
    return None if head is None else _placeholder(head) or _format(head)


def describe_placeholder(path: Path, *, web_pages: bool = True) -> str | None:
    """Return what stands in for the real file and what to do: a pointer, or a web page."""
    head = _head(path)
    if head is None:
        return None
    return _placeholder(head) if web_pages else _pointer(head)


def _head(path: Path) -> bytes | None:
    """Return the first bytes of a file, None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return None


def not_a(kind: str, path: Path, reason: str) -> CheckpointError:
    """Return the error for a file of another format.

    Args:
      kind: the format that was expected, with its article.
      path: the file.
      reason: what its reader found, for a file that is not recognized.
    """
    found = describe_file(path)
    return CheckpointError(
        f"{path}: not {kind} ({reason})." if found is None else f"{path}: not {kind}, but {found}."
    )


def _pointer(head: bytes) -> str | None:
    """Return the description of a pointer of Git LFS or git-annex by its first bytes."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    matches = (description for start, description in _POINTERS.items() if text.startswith(start))
    return next(matches, None)


def _placeholder(head: bytes) -> str | None:
    """Return the description of a pointer or a web page by its first bytes."""
    pointer = _pointer(head)
    if pointer is not None:
        return pointer
    lower = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<title")):
        return _WEB_PAGE
    if lower.startswith(b"<?xml") or lower.startswith(b"<error"):
        return _WEB_PAGE if b"<html" in lower else _XML
    if lower.startswith(b"<!--") and b"<html" in lower:
        return _WEB_PAGE
    return None


def _format(head: bytes) -> str | None:
    """Return the description of a file in a known format by its first bytes."""
    for start, description in _FORMATS.items():
        if head.startswith(start):
            return description
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head:
            return f"a PyTorch pickle: {PICKLE_ADVICE.removesuffix('.')}"
        return "a ZIP archive: unpack it first"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        return f"a PyTorch or Python pickle: {PICKLE_ADVICE.removesuffix('.')}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if not head:
        return f"an empty file: {_DOWNLOAD}"
    if not head.strip(b"\0"):
        return f"a file of zero bytes, as an interrupted download leaves it: {_DOWNLOAD}"
    if head.lstrip()[:1] == b"{":
        return f"JSON text, such as the error message of a server: {_DOWNLOAD}"
    return None
