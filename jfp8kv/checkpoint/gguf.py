"""Read GGUF files: metadata and tensors, which are dequantized while they are read.

The header is parsed here, because the gguf library's reader takes seconds for a vocabulary of 50
thousand strings. Value and tensor types, block sizes and dequantization come from the library. GGUF
lists dimensions fastest first; shapes here are slowest first. Source: the GGUF specification in the
ggml repository (versions 2 and 3, little-endian).
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from jfp8kv.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from jfp8kv.checkpoint.tensors import BFLOAT16, StoredTensor, chunks, read_exactly
from jfp8kv.core.errors import CheckpointError
from jfp8kv.core.file_contents import not_a
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families.gguf import config_from_gguf
from jfp8kv.text.tokenizer import Tokenizer

_SCALARS = {
    gguf.GGUFValueType.UINT8: "<B",
    gguf.GGUFValueType.INT8: "<b",
    gguf.GGUFValueType.UINT16: "<H",
    gguf.GGUFValueType.INT16: "<h",
    gguf.GGUFValueType.UINT32: "<I",
    gguf.GGUFValueType.INT32: "<i",
    gguf.GGUFValueType.FLOAT32: "<f",
    gguf.GGUFValueType.BOOL: "<?",
    gguf.GGUFValueType.UINT64: "<Q",
    gguf.GGUFValueType.INT64: "<q",
    gguf.GGUFValueType.FLOAT64: "<d",
}
_FLOATS: dict[gguf.GGMLQuantizationType, np.dtype] = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: BFLOAT16,
}
# By `general.type`: files that are not a model.
_OTHER_TYPES = {
    "adapter": (
        "only a LoRA adapter, without the weights of a model: merge it into its base model with "
        "llama-export-lora."
    ),
    "mmproj": "only the image or audio encoder of a model: load the file of its language model.",
    "imatrix": "an importance matrix for quantization, not a model.",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF model: its metadata, config and weights."""

    path: Path
    fields: Mapping[str, Any]
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]

    def read_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the file; None, with a warning, if it is not supported."""
        return tokenizer_from_gguf(self.fields, eos_ids=self.config.eos_ids, where=self.path)


def open_gguf(path: Path) -> GGUFFile:
    """Read a GGUF file's header.

    Raises:
      CheckpointError: the file is truncated, damaged or not GGUF.
      ConfigError: its architecture is not supported.
    """
    fields, tensors = read_header(path)
    kind = fields.get("general.type", "model")
    if kind in _OTHER_TYPES:
        raise CheckpointError(f"{path}: {_OTHER_TYPES[kind]}")
    factors = tensors.pop(_ROPE_FACTORS, None)
    rope_factors = None if factors is None else _read_float32(factors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = config_from_gguf(fields, tensors=shapes, rope_factors=rope_factors, where=str(path))
    return GGUFFile(path, fields, config, tensors)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the metadata and the tensors of any GGUF file by name.

    Raises:
      CheckpointError: the file is truncated, damaged or not GGUF.
    """
    try:
        return _read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    with open(path, "rb") as file:
        header = _Header(file, path)
        if file.read(4) != b"GGUF":
            raise not_a("a GGUF file", path, "it does not begin with 'GGUF'")
        version = header.number("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path}: GGUF version {version} is not supported: must be 2 or 3, little-endian."
            )
        tensor_count = header.number("<Q")
        field_count = header.number("<Q")
        fields = {header.string(): header.value() for _ in range(field_count)}
        if (parts := _integer(path, fields, "split.count", 0)) > 1:
            raise CheckpointError(
                f"{path}: one of {parts} parts: merge them with llama-gguf-split --merge."
            )
        infos = [header.tensor_info() for _ in range(tensor_count)]
        alignment = _integer(
            path, fields, "general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT, minimum=1
        )
        data_start = -(-file.tell() // alignment) * alignment
    return fields, {
        name: _tensor(path, name, shape, kind, offset, data_start)
        for name, shape, kind, offset in infos
    }


def _integer(
    path: Path, fields: Mapping[str, Any], key: str, default: int, minimum: int = 0
) -> int:
    value = fields.get(key, default)
    if type(value) is not int or value < minimum:
        raise CheckpointError(
            f"{path}: {key}={value!r}: must be an integer of at least {minimum}: damaged header."
        )
    return value


class _Header:
    """A cursor over the header. Raises `CheckpointError` if the file ends early."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = path.stat().st_size

    def take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) < count:
            raise CheckpointError(
                f"{self._path}: truncated or damaged: its header goes past the end of the file."
            )
        return data

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self) -> Any:
        return self._value_of(self._enum(gguf.GGUFValueType))

    def tensor_info(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name = self.string()
        dims = self.number("<I")
        shape = struct.unpack(f"<{dims}Q", self.take(8 * dims))[::-1]
        return name, shape, self._enum(gguf.GGMLQuantizationType), self.number("<Q")

    def _value_of(self, kind: gguf.GGUFValueType) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item = self._enum(gguf.GGUFValueType)
        count = self.number("<Q")
        if item in _SCALARS:
            size = struct.calcsize(_SCALARS[item])
            return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", self.take(size * count)))
        return [self._value_of(item) for _ in range(count)]

    def _enum(self, kind: Callable[[int], Any]) -> Any:
        number = self.number("<I")
        try:
            return kind(number)
        except ValueError as error:
            raise CheckpointError(
                f"{self._path}: unknown {kind.__name__} {number}: damaged, or newer than the "
                "installed gguf library."
            ) from error


def _tensor(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    kind: gguf.GGMLQuantizationType,
    offset: int,
    data_start: int,
) -> StoredTensor:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise CheckpointError(
            f"{path}: {name} {kind.name} {list(shape)}: rows must be whole blocks of {block}: "
            "damaged header."
        )
    start = data_start + offset
    end = start + math.prod(shape) // block * block_bytes
    size = path.stat().st_size
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {end}, the file has {size}: download it again."
        )
    dtype = _FLOATS.get(kind) or (BFLOAT16 if _dequantizes(kind) else None)
    return StoredTensor(
        name, shape, kind.name, dtype, path, partial(_read, path, start, kind, shape)
    )


@lru_cache
def _dequantizes(kind: gguf.GGMLQuantizationType) -> bool:
    """Return whether the gguf library can dequantize this type, by trying one block of zeros."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _read(
    path: Path, start: int, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], out: np.ndarray
) -> None:
    if _FLOATS.get(kind) == out.dtype:
        read_exactly(path, start, out)
        return
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block * block_bytes
    rows = out.reshape(-1, shape[-1])
    for part in chunks(len(rows), 4 * shape[-1]):
        raw = np.empty((part.stop - part.start, row_bytes), np.uint8)
        read_exactly(path, start + part.start * row_bytes, raw)
        is_float = kind in _FLOATS
        values = raw.view(_FLOATS[kind]) if is_float else gguf.quants.dequantize(raw, kind)
        with np.errstate(over="ignore"):  # read_into reports values that do not fit
            rows[part] = values.astype(out.dtype)


def _read_float32(tensor: StoredTensor) -> np.ndarray:
    out = np.empty(tensor.shape, np.float32)
    tensor.read(out)
    return out
