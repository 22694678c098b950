"""A tensor that is still in a file, and the streaming of many of them into a model's tree.

Memory is the point. Each parameter is one aligned host array, filled tensor by tensor with plain reads (mapped pages
would count as ours) and handed to JAX, which takes over the memory as it is on a CPU and copies it to any other
device. Nothing else is ever held but one chunk of the tensor being converted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import (
    Module,
    Shape,
    Source,
    each_source,
    expected_shapes,
    nest,
    require_names,
    require_shape,
    sources,
)

CHUNK_BYTES = 4 << 20
ALIGNMENT = 64  # bytes; what XLA:CPU asks of memory it is to use without a copy
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    `stored` says how the file keeps it ("BF16", "Q4_K"); `dtype` is the float dtype that keeps it best, or None when it
    cannot be read as a weight. `read(out)` fills an array of `shape`, in the float dtype of `out`. `offset` is where its
    bytes begin in `file`, when they lie there in C order.
    """

    name: str
    shape: Shape
    stored: str
    dtype: np.dtype | None
    file: Path
    read: Callable[[np.ndarray], None]
    offset: int | None = None

    def read_into(self, out: np.ndarray) -> None:
        """Fill `out`, or raise a `CheckpointError` naming file and tensor when a value does not fit its dtype."""
        self.read(out)
        if out.dtype == np.float16 and self.dtype != np.float16 and not np.isfinite(out).all():
            raise CheckpointError(
                f"{self.file}: {self.name} has values beyond float16's largest, 65504; load with dtype='bfloat16' or 'float32'."
            )


def weights_dtype(tensors: Mapping[str, StoredTensor]) -> np.dtype:
    """The dtype most of the elements are stored in."""
    counts: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype is not None:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(counts, key=counts.__getitem__, default=BFLOAT16)


def assemble(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    modules: Mapping[str, Module],
    dtype: np.dtype,
    *,
    where: Path,
) -> dict:
    """The native tree of a model, streamed from its tensors. All names, shapes and dtypes are checked before any read.

    Args:
      tensors: every weight of the checkpoint under the names that `modules` gives.
      modules: the checkpoint's layout (models/layouts.py).
      dtype: of every parameter of the result.
      where: the checkpoint, for messages.

    Raises:
      CheckpointError: a tensor missing, unexpected, of the wrong shape, quantized, or out of `dtype`'s range.
    """
    found, shapes = sources(config, modules), expected_shapes(config)
    each = each_source(found)
    _refuse_quantized(tensors)
    require_names(tensors, each, where=str(where))
    for name, shape in each.items():
        tensor = tensors[name]
        require_shape(tensor.name, tensor.shape, shape, where=str(tensor.file))
    return nest(
        {ours: parameter(shapes[ours], parts, tensors, dtype) for ours, parts in found.items()}
    )


def parameter(
    shape: Shape, parts: list[Source], tensors: Mapping[str, StoredTensor], dtype: np.dtype
) -> jax.Array:
    """One parameter on the default device, its parts read one after another."""
    host = aligned_empty(shape, dtype)
    rows = host.reshape(len(parts), *parts[0].part)
    for row, part in zip(rows, parts, strict=True):
        if part.take is None:
            tensors[part.name].read_into(row)
        else:
            whole = np.empty(part.shape, np.float32 if part.wide else dtype)
            tensors[part.name].read_into(whole)
            row[...] = part.take(whole)
    array = jax.device_put(host, may_alias=True)
    array.block_until_ready()  # frees the host copy before the next parameter where the device has memory of its own
    return array


def same_values(a: StoredTensor, b: StoredTensor | None) -> bool:
    """Whether `b` is there and holds the same values as `a`. Reads both."""
    if b is None or a.shape != b.shape or None in (a.dtype, b.dtype):
        return False
    first, second = (np.empty(t.shape, a.dtype) for t in (a, b))
    a.read_into(first)
    b.read_into(second)
    return np.array_equal(first, second)


def _refuse_quantized(tensors: Mapping[str, StoredTensor]) -> None:
    for tensor in tensors.values():
        if tensor.dtype is None:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.stored}: quantized weights of this kind are not "
                "read; weights may be F32, BF16 or F16, float8 where config.json declares how, and in GGUF the quantized "
                "types that the gguf library reads."
            )


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Uninitialized host memory that XLA:CPU can adopt without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def read_exactly(path: Path, offset: int, out: np.ndarray) -> None:
    """Fill the bytes of a contiguous array from a file, or raise a `CheckpointError` when the file ends early."""
    view = memoryview(out.reshape(-1).view(np.uint8))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{path}: the file ends {len(view)} bytes early; it is truncated: fetch it again."
                )
            view = view[count:]


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices over `rows` of about `CHUNK_BYTES` each."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
