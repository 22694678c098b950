"""Reading and writing safetensors files: a length, a JSON header, and raw little-endian bytes.

The file is read by its header's offsets with plain reads instead of the safetensors library, for two reasons: the
library maps the file, so its pages count as our memory beside the copy, and it cannot hand float8 tensors to NumPy. It is
written likewise, one tensor after another, where the library wants all of them at once.
Source: the format's description in the safetensors repository.
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

DTYPES = {
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
WEIGHTS = {
    "F64": np.dtype(np.float32),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
}
_ALIGNMENT = 8  # bytes, of where the data begins
_MAX_HEADER = 100 << 20  # the format's own limit


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by its name; only the header is read.

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
            raise CheckpointError(
                f"{path}: not a safetensors file (its header would take {length} bytes)."
            )
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{path}: truncated in its header ({len(text)} of {length} bytes): fetch it again."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file (its header is not JSON: {error})."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is not a JSON object).")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    damaged = CheckpointError(f"{path}: the header's entry for {name} is damaged: {entry!r}.")
    try:
        stored, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged from error
    if not isinstance(stored, str) or not all(
        type(number) is int and number >= 0 for number in (*shape, start, end)
    ):
        raise damaged
    dtype = DTYPES.get(stored)
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {name} {stored} {list(shape)} does not fit its {end - start} bytes: damaged header."
        )
    if end > data_bytes:
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {data_start + end}, the file has {data_start + data_bytes}: fetch "
            "it again."
        )
    read = partial(_read, path, data_start + start, dtype)
    return StoredTensor(name, shape, stored, WEIGHTS.get(stored), path, read, data_start + start)


def _read(path: Path, offset: int, stored: np.dtype, out: np.ndarray) -> None:
    if out.dtype == stored:
        return read_exactly(path, offset, out)
    flat = out.reshape(-1)
    for part in chunks(flat.size, stored.itemsize):
        raw = np.empty(part.stop - part.start, stored)
        read_exactly(path, offset + part.start * stored.itemsize, raw)
        with np.errstate(over="ignore"):  # read_into reports values that do not fit
            flat[part] = raw.astype(out.dtype)
    return None


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `make` gives its values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[NewTensor], metadata: dict[str, str]) -> None:
    """Write a file of `tensors`, those with the widest elements first, so that each lies at a multiple of its element's size.

    One tensor at a time is held.
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
            file.write(_bytes(tensor))


def _bytes(tensor: NewTensor) -> np.ndarray:
    values = np.ascontiguousarray(tensor.make())
    assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype), tensor.name
    return values.reshape(-1).view(np.uint8)
