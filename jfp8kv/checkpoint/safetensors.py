"""Read and write safetensors files: a length, a JSON header, and raw little-endian bytes.

The safetensors library is not used. It maps the file, so the mapped pages count as memory of the
process in addition to the copy, it cannot convert float8 tensors to NumPy, and for writing it needs
all tensors in memory at once. Source: the description of the format in the safetensors repository.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jfp8kv.checkpoint.tensors import BFLOAT16, StoredTensor, chunks, read_exactly
from jfp8kv.core.errors import CheckpointError
from jfp8kv.core.file_contents import not_a

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The dtypes that weights are read as.
_WEIGHT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float32),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
}
_ALIGNMENT = 8  # bytes; of the start of the data
_MAX_HEADER = 100 << 20  # bytes; a limit of the format


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a file by its name. Only the header is read.

    Raises:
      CheckpointError: the file is truncated, not safetensors, or cannot be opened.
    """
    try:
        header, data_start = _header(path)
        data_bytes = path.stat().st_size - data_start
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    header.pop("__metadata__", None)
    return {
        name: _tensor(path, name, entry, data_start, data_bytes) for name, entry in header.items()
    }


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise not_a("a safetensors file", path, f"its header would have {length} bytes")
        text = file.read(length)
    if len(text) < length:
        if text and not text.startswith(b"{"):
            raise not_a("a safetensors file", path, "its header is not JSON")
        raise CheckpointError(
            f"{path}: truncated in its header ({len(text)} of {length} bytes): download it again."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise not_a("a safetensors file", path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise not_a("a safetensors file", path, "its header is not a JSON object")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    stored_dtype, shape, start, end = _entry(path, name, entry)
    dtype = DTYPES.get(stored_dtype)
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {name} {stored_dtype} {list(shape)} does not fit its {end - start} bytes: "
            "damaged header."
        )
    if end > data_bytes:
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {data_start + end}, the file has "
            f"{data_start + data_bytes}: download it again."
        )
    return StoredTensor(
        name,
        shape,
        stored_dtype,
        _WEIGHT_DTYPES.get(stored_dtype),
        path,
        partial(_read, path, data_start + start, dtype),
        data_start + start,
    )


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape and byte range of a tensor from its entry in the header."""
    damaged = CheckpointError(f"{path}: the header's entry for {name} is damaged: {entry!r}.")
    if not isinstance(entry, dict):
        raise damaged
    dtype = entry.get("dtype")
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise damaged
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise damaged
    return dtype, tuple(shape), offsets[0], offsets[1]


def _read(path: Path, offset: int, stored: np.dtype | None, out: np.ndarray) -> None:
    assert stored is not None, "tensors of unknown dtypes are not read"
    if out.dtype == stored:
        read_exactly(path, offset, out)
        return
    flat = out.reshape(-1)
    for part in chunks(flat.size, stored.itemsize):
        raw = np.empty(part.stop - part.start, stored)
        read_exactly(path, offset + part.start * stored.itemsize, raw)
        with np.errstate(over="ignore"):  # read_into reports values that do not fit
            flat[part] = raw.astype(out.dtype)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to write. `compute` returns its values when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[LazyTensor], metadata: dict[str, str]) -> None:
    """Write a file of `tensors`, one at a time in memory.

    Tensors with the widest elements go first, so that each is aligned to its element size.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            file.write(_bytes(tensor).data)


def _bytes(tensor: LazyTensor) -> np.ndarray:
    values = np.ascontiguousarray(tensor.compute())
    assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype), tensor.name
    return values.reshape(-1).view(np.uint8)
