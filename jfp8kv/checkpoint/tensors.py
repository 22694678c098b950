"""Tensors in checkpoint files, and streaming them into the parameter tree of a model.

Loading is designed for low peak memory. Each parameter is one aligned host array, which is filled
tensor by tensor with plain reads (memory-mapped pages would count as memory of the process) and
passed to JAX, which adopts the memory on a CPU and copies it to any other device. Only one chunk of
the tensor that is being converted is in memory in addition.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import (
    ModuleLayout,
    Shape,
    TensorSource,
    expected_shapes,
    require_names,
    require_shape,
    source_shapes,
    tensor_sources,
    unflatten,
)

CHUNK_BYTES = 4 << 20
ALIGNMENT = 64  # bytes; XLA:CPU adopts host memory without a copy at this alignment
BFLOAT16: np.dtype = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
      stored_dtype: the file's name for its type, such as "BF16" or "Q4_K".
      dtype: the float dtype to read it as; None if it cannot be read as a weight.
      read: fills an array of `shape`, in the float dtype of that array.
      offset: where its bytes start in `file`; None if they are not stored there in C order.
    """

    name: str
    shape: Shape
    stored_dtype: str
    dtype: np.dtype | None
    file: Path
    read: Callable[[np.ndarray], None]
    offset: int | None = None

    def read_into(self, out: np.ndarray) -> None:
        """Fill `out`.

        Raises:
          CheckpointError: a value does not fit the dtype of `out`, naming file and tensor.
        """
        self.read(out)
        if out.dtype == np.float16 and self.dtype != np.float16 and not np.isfinite(out).all():
            raise CheckpointError(
                f"{self.file}: {self.name} has values beyond float16's largest, 65504; load with "
                "dtype='bfloat16' or 'float32'."
            )


def most_common_dtype(tensors: Mapping[str, StoredTensor]) -> np.dtype:
    """Return the dtype that most elements are stored in."""
    counts: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype is not None:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(counts, key=counts.__getitem__, default=BFLOAT16)


def load_tree(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    modules: Mapping[str, ModuleLayout],
    dtype: np.dtype,
    *,
    where: Path,
) -> dict[str, Any]:
    """Read the parameter tree of a model. All names, shapes and dtypes are checked before any read.

    Args:
      tensors: every weight of the checkpoint, under the names that `modules` gives.
      modules: the layout of the checkpoint (models/layouts.py).
      dtype: of every parameter of the result.
      where: the checkpoint, for error messages.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of the wrong shape, quantized in an
        unsupported way, or out of `dtype`'s range.
    """
    parts = tensor_sources(config, modules)
    shapes = expected_shapes(config)
    expected = source_shapes(parts)
    _require_floats(tensors)
    require_names(tensors, expected, where=str(where))
    for name, shape in expected.items():
        tensor = tensors[name]
        require_shape(tensor.name, tensor.shape, shape, where=str(tensor.file))
    return unflatten(
        {name: load_parameter(shapes[name], each, tensors, dtype) for name, each in parts.items()}
    )


def load_parameter(
    shape: Shape, parts: list[TensorSource], tensors: Mapping[str, StoredTensor], dtype: np.dtype
) -> jax.Array:
    """Read one parameter, part by part, onto the default device."""
    host = aligned_empty(shape, dtype)
    rows = host.reshape(len(parts), *parts[0].part)
    for row, part in zip(rows, parts, strict=True):
        if part.extract is None:
            tensors[part.name].read_into(row)
        else:
            tensor = np.empty(part.shape, np.float32 if part.needs_float32 else dtype)
            tensors[part.name].read_into(tensor)
            row[...] = part.extract(tensor)
    array: jax.Array = jax.device_put(host, may_alias=True)
    # Where the device has separate memory, this frees the host copy before the next parameter.
    array.block_until_ready()
    return array


def equal_tensors(a: StoredTensor, b: StoredTensor | None) -> bool:
    """Read both tensors and return whether their values are equal. False if `b` is None."""
    if b is None or a.shape != b.shape or a.dtype is None or b.dtype is None:
        return False
    a_values = np.empty(a.shape, a.dtype)
    b_values = np.empty(b.shape, a.dtype)
    a.read_into(a_values)
    b.read_into(b_values)
    return np.array_equal(a_values, b_values)


def _require_floats(tensors: Mapping[str, StoredTensor]) -> None:
    for tensor in tensors.values():
        if tensor.dtype is None:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.stored_dtype}, which is not "
                "supported for weights. Supported are F32, BF16 and F16, float8 where config.json "
                "declares the quantization, and in GGUF files the quantized types that the gguf "
                "library reads."
            )


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Return uninitialized host memory that XLA:CPU can adopt without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def read_exactly(path: Path, offset: int, out: np.ndarray) -> None:
    """Fill the bytes of a contiguous array from a file.

    Raises:
      CheckpointError: the file ends early.
    """
    view = memoryview(out.reshape(-1).view(np.uint8).data)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{path}: the file ends {len(view)} bytes early; it is truncated: "
                    "download it again."
                )
            view = view[count:]


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Yield slices over `rows` of about `CHUNK_BYTES` each."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
