"""Dequantize FP8 and MXFP4 weights while they are read: each becomes a `StoredTensor` of floats.

A float8 weight has its scales in a second tensor: one scale for the tensor, for each output
channel, or for each block of rows and columns. The first two are handled as blocks of these sizes.
`real = stored * scale` holds for every name of the scale tensor, `weight_scale_inv` included. MXFP4
experts have two 4-bit values per byte, the low half first, and a power of two for every 32 values.
Only one chunk of a weight and the weight's scales are in memory at a time.
"""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from jfp8kv.checkpoint.tensors import StoredTensor, chunks, read_exactly
from jfp8kv.core.errors import CheckpointError
from jfp8kv.core.formats import kv_format
from jfp8kv.models.names import Shape
from jfp8kv.models.quantization import Block, WeightScheme

FP8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
MXFP4 = "MXFP4"
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_SCALES = ("_scale", "_scale_inv")
# The value of every code.
_FP8_VALUES = {
    stored: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for stored, dtype in FP8.items()
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_VALUES = np.concatenate([_E2M1, -_E2M1])
# By byte: the values of the low half and of the high half.
_E2M1_PAIRS = np.stack([np.tile(_E2M1_VALUES, 16), np.repeat(_E2M1_VALUES, 16)], axis=1)
_MX_GROUP_BYTES = 16

# Scales of activations. They are ignored, because activations are not quantized here.
_ACTIVATIONS = re.compile(
    r"(\.|_proj_)(input_scale|input_zero_point|input_scale_ub|activation_scale)$"
)
_WEIGHT_SCALES = re.compile(r"(\.weight|_proj)_(scale|scale_inv|zero_point)$")


def dequantize(
    tensors: Mapping[str, StoredTensor], scheme: WeightScheme | None, dtype: np.dtype
) -> dict[str, StoredTensor]:
    """Replace every quantized weight by one that reads as `dtype`, and drop all scales.

    Names, shapes and dtypes are checked here, values when they are read. Without a scheme the
    weights are returned unchanged.

    Raises:
      CheckpointError: a quantized weight whose scale is missing or of the wrong shape or dtype, or
        a scale without a quantized weight; when values are read, an invalid scale or weight.
    """
    if scheme is None:
        return dict(tensors)
    remaining = {name: each for name, each in tensors.items() if not _ACTIVATIONS.search(name)}
    if scheme.kind == "mxfp4":
        weights = _mxfp4_weights(remaining, dtype)
    else:
        weights = _fp8_weights(remaining, scheme, dtype)
    for name, tensor in remaining.items():
        if _WEIGHT_SCALES.search(name):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is the scale of a weight that is missing or not "
                "quantized."
            )
    return remaining | weights


def warn_dequantized(
    folder: Path, scheme: WeightScheme | None, tensors: Mapping[str, StoredTensor], dtype: np.dtype
) -> None:
    """Warn that quantized weights are dequantized to `dtype`. No warning without a scheme."""
    if scheme is None:
        return
    count = sum(tensor.stored_dtype in (*FP8, MXFP4) for tensor in tensors.values())
    if count:
        message = (
            f"{count} quantized weights ({scheme}) are dequantized to {dtype.name}, "
            f"{dtype.itemsize} bytes per element."
        )
    else:
        message = (
            f"its config declares quantized weights ({scheme}), but no weight is quantized: the "
            "weights are loaded unchanged."
        )
    warnings.warn(f"{folder}: {message}", stacklevel=4)


def _fp8_weights(
    remaining: dict[str, StoredTensor], scheme: WeightScheme, dtype: np.dtype
) -> dict[str, StoredTensor]:
    """Return the float8 weights, dequantized, and remove their scales from `remaining`."""
    _drop_zero_points(remaining)
    names = [
        name
        for name, tensor in remaining.items()
        if tensor.stored_dtype in FP8 and not name.endswith(_SCALES)
    ]
    weights = {}
    for name in names:
        weight = remaining[name]
        scale = _scale_of(name, weight, remaining)
        block = _block(weight, scale, scheme)
        read = partial(_read_fp8, weight, scale, block)
        weights[name] = dataclasses.replace(weight, dtype=dtype, read=read, offset=None)
    return weights


def _scale_of(name: str, weight: StoredTensor, remaining: dict[str, StoredTensor]) -> StoredTensor:
    """Remove the scale of a weight from `remaining` and return it."""
    scales = [remaining.pop(name + suffix) for suffix in _SCALES if name + suffix in remaining]
    if len(scales) == 1:
        return scales[0]
    allowed = " and ".join(weight.name + suffix for suffix in _SCALES)
    problem = "has two scales" if scales else "has no scale"
    raise CheckpointError(
        f"{weight.file}: {weight.name} is {weight.stored_dtype} and {problem}: exactly one of "
        f"{allowed} is needed."
    )


def _drop_zero_points(remaining: dict[str, StoredTensor]) -> None:
    """Remove the zero points of symmetric scales, which some tools write. They must be zero."""
    names = [name for name in remaining if _WEIGHT_SCALES.search(name)]
    for name in [name for name in names if name.endswith("_zero_point")]:
        tensor = remaining.pop(name)
        values = np.empty(tensor.shape, np.float32)
        tensor.read(values)
        if values.any():
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is not zero: asymmetric float8 weights are not "
                "supported."
            )


def _block(weight: StoredTensor, scale: StoredTensor, scheme: WeightScheme) -> Block:
    """Return the rows and columns that share a scale: the scheme's block that fits the shapes."""
    if scale.stored_dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: {scale.name} is stored as {scale.stored_dtype}: a scale must be one of "
            f"{', '.join(_SCALE_DTYPES)}."
        )
    rows, columns = (1, *weight.shape)[-2:]
    fitting = set()
    allowed: list[Shape] = []
    for block_rows, block_columns in scheme.blocks:
        block = (min(block_rows, rows) or rows or 1, min(block_columns, columns) or columns or 1)
        shapes = _scale_shapes(weight.shape, block)
        allowed += shapes
        if scale.shape in shapes:
            fitting.add(block)
    if len(fitting) == 1:
        return fitting.pop()
    problem = "must be " + " or ".join(str(list(shape)) for shape in allowed)
    if fitting:
        problem = "fits more than one of its blocks"
    raise CheckpointError(
        f"{scale.file}: {scale.name} has shape {list(scale.shape)}; for a weight of shape "
        f"{list(weight.shape)} and {scheme} it {problem}."
    )


def _scale_shapes(weight: Shape, block: Block) -> list[Shape]:
    """Return the shapes that tools give a grid of scales: in full, or without axes of size 1."""
    *lead, rows, columns = (1, *weight) if len(weight) == 1 else weight
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    shapes = [grid]
    if grid[-1] == 1:
        shapes.append(grid[:-1])
    if grid[-2:] == (1, 1):
        shapes.append(grid[:-2])
        shapes += [(), (1,)] if math.prod(lead) == 1 else []
    return list(dict.fromkeys(shapes))


def _read_fp8(weight: StoredTensor, scale: StoredTensor, block: Block, out: np.ndarray) -> None:
    rows, columns = (1, *weight.shape)[-2:]
    # Leading axes and blocks of rows are on one axis.
    grid = _read_scales(scale).reshape(-1, -(-columns // block[1]))
    blocks = -(-rows // block[0])
    assert weight.offset is not None, "float8 weights are read from their file directly"
    flat = _rows(out, columns)
    for part in chunks(len(flat), 4 * columns):
        codes = np.empty((part.stop - part.start, columns), np.uint8)
        read_exactly(weight.file, weight.offset + part.start * columns, codes)
        row = np.arange(part.start, part.stop)
        scales = grid[row // rows * blocks + row % rows // block[0]]
        if scales.shape[1] > 1:
            scales = np.repeat(scales, block[1], axis=1)[:, :columns]
        values = _FP8_VALUES[weight.stored_dtype][codes]
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            flat[part] = values * scales
        _require_finite(weight, values, flat[part])


def _read_scales(scale: StoredTensor) -> np.ndarray:
    values = np.empty(scale.shape, np.float32)
    scale.read(values)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        at = np.argwhere(bad)[0].tolist()
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {values[tuple(at)]} at {at}: scales must be positive "
            "and finite."
        )
    return values


def _require_finite(weight: StoredTensor, values: np.ndarray, out: np.ndarray) -> None:
    if np.isfinite(out).all():
        return
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{weight.file}: {weight.name} has {weight.stored_dtype} codes of NaN or infinity: "
            "damaged."
        )
    raise CheckpointError(
        f"{weight.file}: {weight.name} times its scales exceeds {out.dtype.name}'s largest value, "
        f"{kv_format(out.dtype.name).largest:g}; load with dtype='bfloat16' or 'float32'."
    )


def _rows(out: np.ndarray, columns: int) -> np.ndarray:
    flat = out.reshape(-1, columns)
    assert np.shares_memory(flat, out), "a weight is read into contiguous memory"
    return flat


def _mxfp4_weights(remaining: dict[str, StoredTensor], dtype: np.dtype) -> dict[str, StoredTensor]:
    """Return the MXFP4 weights, dequantized, and remove their tensors from `remaining`.

    Their shape is `[experts, in, out]`, as in gpt-oss's bfloat16 checkpoints.
    """
    names = {
        name.removesuffix(suffix)
        for name in remaining
        for suffix in ("_blocks", "_scales")
        if name.endswith(suffix)
    }
    weights = {}
    for name in sorted(names):
        blocks = remaining.pop(f"{name}_blocks", None)
        scales = remaining.pop(f"{name}_scales", None)
        if blocks is None or scales is None:
            missing = f"{name}_blocks" if blocks is None else f"{name}_scales"
            present = blocks or scales
            assert present is not None
            raise CheckpointError(f"{present.file}: {present.name} has no {missing}.")
        _require_mxfp4(blocks, scales)
        experts, rows, groups, _ = blocks.shape
        weights[name] = StoredTensor(
            blocks.name.removesuffix("_blocks"),
            (experts, 2 * _MX_GROUP_BYTES * groups, rows),
            MXFP4,
            dtype,
            blocks.file,
            partial(_read_mxfp4, blocks, scales),
        )
    return weights


def _require_mxfp4(blocks: StoredTensor, scales: StoredTensor) -> None:
    """Check dtypes and shapes of an MXFP4 weight."""
    shape = blocks.shape
    if blocks.stored_dtype != "U8" or len(shape) != 4 or shape[-1] != _MX_GROUP_BYTES:
        raise CheckpointError(
            f"{blocks.file}: {blocks.name} {blocks.stored_dtype} {list(shape)}: must be U8 "
            f"[experts, rows, groups, {_MX_GROUP_BYTES}]."
        )
    if scales.stored_dtype != "U8" or scales.shape != shape[:-1]:
        raise CheckpointError(
            f"{scales.file}: {scales.name} {scales.stored_dtype} {list(scales.shape)}: must be U8 "
            f"{list(shape[:-1])}, one exponent per group of the blocks."
        )


def _read_mxfp4(blocks: StoredTensor, scales: StoredTensor, out: np.ndarray) -> None:
    experts, rows, groups, _ = blocks.shape
    assert blocks.offset is not None and scales.offset is not None
    row_bytes = 4 * 2 * _MX_GROUP_BYTES * groups  # of the float32 values
    for expert, part in itertools.product(range(experts), chunks(rows, row_bytes)):
        codes = np.empty((part.stop - part.start, groups, _MX_GROUP_BYTES), np.uint8)
        exponents = np.empty((part.stop - part.start, groups, 1), np.uint8)
        first = (expert * rows + part.start) * groups
        read_exactly(blocks.file, blocks.offset + first * _MX_GROUP_BYTES, codes)
        read_exactly(scales.file, scales.offset + first, exponents)
        if (exponents == 255).any():
            raise CheckpointError(
                f"{scales.file}: {scales.name} contains 255, the exponent that means NaN: damaged."
            )
        values = _E2M1_PAIRS[codes].reshape(len(codes), groups, -1)
        with np.errstate(over="ignore"):  # checked below
            real = np.ldexp(values, exponents.astype(np.int32) - 127).reshape(len(codes), -1)
            out[expert][:, part] = real.T
        _require_finite(blocks, values, out[expert][:, part])
