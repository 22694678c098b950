"""Quantized weights become plain ones while they stream: each is a `StoredTensor` that dequantizes as it is read.

A float8 weight lies beside its scales: one for the tensor, for each output channel, or for each block of rows and
columns. All three are the last one with blocks of different sizes, and `real = stored * scale` always, whatever the name
of the scale tensor says: `weight_scale_inv` multiplies too. MXFP4 experts keep two 4-bit values a byte, low half first,
and a power of two for every 32. Nothing is held beyond one chunk of a weight and that weight's scales.
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
from jfp8kv.models.names import Shape
from jfp8kv.models.quantization import Block, WeightScheme

FP8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
MXFP4 = "MXFP4"
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_SCALES = ("_scale", "_scale_inv")
# What every code means, by code.
_FP8_VALUES = {
    stored: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for stored, dtype in FP8.items()
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_VALUES = np.concatenate([_E2M1, -_E2M1])
_E2M1_PAIRS = np.stack(
    [np.tile(_E2M1_VALUES, 16), np.repeat(_E2M1_VALUES, 16)], axis=1
)  # byte -> low half, high half
_MX_GROUP_BYTES = 16

# Scales of activations, which stay unquantized here.
_ACTIVATIONS = re.compile(
    r"(\.|_proj_)(input_scale|input_zero_point|input_scale_ub|activation_scale)$"
)
_ORPHANS = re.compile(r"(\.weight|_proj)_(scale|scale_inv|zero_point)$")


def dequantized(
    tensors: Mapping[str, StoredTensor], scheme: WeightScheme | None, dtype: np.dtype
) -> dict[str, StoredTensor]:
    """The same weights with every quantized one as a plain weight of `dtype`; its scales, and activations', are gone.

    Names, shapes and dtypes are checked here, the values when they are read: then too a `CheckpointError` names the
    tensor. Without a scheme nothing changes.

    Raises:
      CheckpointError: a quantized weight whose scale is missing or of the wrong shape or dtype; a scale without weight.
    """
    if scheme is None:
        return dict(tensors)
    left = {name: tensor for name, tensor in tensors.items() if not _ACTIVATIONS.search(name)}
    plain = (
        _mxfp4_weights(left, dtype) if scheme.kind == "mxfp4" else _fp8_weights(left, scheme, dtype)
    )
    for name, tensor in left.items():
        if _ORPHANS.search(name):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is the scale of a weight that is not quantized, or not there."
            )
    return left | plain


def warn_dequantized(
    folder: Path, scheme: WeightScheme | None, tensors: Mapping[str, StoredTensor], dtype: np.dtype
) -> None:
    """Say which weights were quantized, and what they have become."""
    if scheme is None:
        return
    count = sum(tensor.stored in (*FP8, MXFP4) for tensor in tensors.values())
    if count:
        told = f"{count} quantized weights ({scheme}) are dequantized to {dtype.name}, {dtype.itemsize} bytes an element."
    else:
        told = f"its config declares quantized weights ({scheme}), but none is: they are loaded as they are."
    warnings.warn(f"{folder}: {told}", stacklevel=4)


def _fp8_weights(
    left: dict[str, StoredTensor], scheme: WeightScheme, dtype: np.dtype
) -> dict[str, StoredTensor]:
    """The float8 weights of `left`, which loses their scales."""
    _drop_zero_points(left)
    found = {}
    for name in [
        name for name, tensor in left.items() if tensor.stored in FP8 and not name.endswith(_SCALES)
    ]:
        weight = left[name]
        scales = [left.pop(name + end) for end in _SCALES if name + end in left]
        if len(scales) != 1:
            names = " and ".join(weight.name + end for end in _SCALES)
            problem = "has two scales" if scales else "has no scale"
            raise CheckpointError(
                f"{weight.file}: {weight.name} is {weight.stored} and {problem}: one of {names} is needed."
            )
        read = partial(_read_fp8, weight, scales[0], _block(weight, scales[0], scheme))
        found[name] = dataclasses.replace(weight, dtype=dtype, read=read, offset=None)
    return found


def _drop_zero_points(left: dict[str, StoredTensor]) -> None:
    """Some tools write zero points beside symmetric scales: zeros, which say nothing."""
    for name in [name for name in left if _ORPHANS.search(name) and name.endswith("_zero_point")]:
        tensor = left.pop(name)
        values = np.empty(tensor.shape, np.float32)
        tensor.read(values)
        if values.any():
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is not zero: asymmetric float8 weights are not read."
            )


def _block(weight: StoredTensor, scale: StoredTensor, scheme: WeightScheme) -> Block:
    """The rows and columns that one scale serves: the block of the scheme that this scale's shape fits."""
    if scale.stored not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: {scale.name} is stored as {scale.stored}: a scale must be one of {', '.join(_SCALE_DTYPES)}."
        )
    rows, columns = (1, *weight.shape)[-2:]
    fits, allowed = set(), []
    for block in scheme.blocks:
        block = (min(block[0], rows) or rows or 1, min(block[1], columns) or columns or 1)
        shapes = _scale_shapes(weight.shape, block)
        allowed += shapes
        if scale.shape in shapes:
            fits.add(block)
    if len(fits) != 1:
        problem = (
            "fits more than one of its blocks"
            if fits
            else "must be " + " or ".join(str(list(s)) for s in allowed)
        )
        raise CheckpointError(
            f"{scale.file}: {scale.name} has shape {list(scale.shape)}, for a weight {list(weight.shape)} and {scheme} "
            f"it {problem}."
        )
    return fits.pop()


def _scale_shapes(weight: Shape, block: Block) -> list[Shape]:
    """The shapes that tools give a grid of scales: in full, or without the axes that one scale spans."""
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
    grid = _read_scales(scale).reshape(
        -1, -(-columns // block[1])
    )  # leading axes and blocks of rows on one axis
    blocks = -(-rows // block[0])
    flat = _rows(out, columns)
    for part in chunks(len(flat), 4 * columns):
        codes = np.empty((part.stop - part.start, columns), np.uint8)
        read_exactly(weight.file, weight.offset + part.start * columns, codes)
        row = np.arange(part.start, part.stop)
        scales = grid[row // rows * blocks + row % rows // block[0]]
        if scales.shape[1] > 1:
            scales = np.repeat(scales, block[1], axis=1)[:, :columns]
        values = _FP8_VALUES[weight.stored][codes]
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
            f"{scale.file}: {scale.name} is {values[tuple(at)]} at {at}: scales must be positive and finite."
        )
    return values


def _require_finite(weight: StoredTensor, values: np.ndarray, out: np.ndarray) -> None:
    if np.isfinite(out).all():
        return
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{weight.file}: {weight.name} holds NaN or infinity in its {weight.stored} codes: damaged."
        )
    raise CheckpointError(
        f"{weight.file}: {weight.name}, multiplied by its scales, has values beyond {out.dtype.name}'s largest, "
        f"{float(ml_dtypes.finfo(out.dtype).max):g}; load with a dtype of more range, 'bfloat16' or 'float32'."
    )


def _rows(out: np.ndarray, columns: int) -> np.ndarray:
    flat = out.reshape(-1, columns)
    assert np.shares_memory(flat, out), "a weight is read into contiguous memory"
    return flat


def _mxfp4_weights(left: dict[str, StoredTensor], dtype: np.dtype) -> dict[str, StoredTensor]:
    """The MXFP4 weights of `left`, which loses their blocks and scales. `[experts, in, out]`, as gpt-oss in bfloat16 is."""
    found = {}
    for name in sorted(
        {
            name.removesuffix(end)
            for name in left
            for end in ("_blocks", "_scales")
            if name.endswith(end)
        }
    ):
        blocks, scales = left.pop(name + "_blocks", None), left.pop(name + "_scales", None)
        if blocks is None or scales is None:
            there = blocks or scales
            missing = "_scales" if scales is None else "_blocks"
            raise CheckpointError(f"{there.file}: {there.name} is there without {name + missing}.")
        if blocks.stored != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] != _MX_GROUP_BYTES:
            raise CheckpointError(
                f"{blocks.file}: {blocks.name} {blocks.stored} {list(blocks.shape)}: must be U8 "
                f"[experts, rows, groups, {_MX_GROUP_BYTES}]."
            )
        if scales.stored != "U8" or scales.shape != blocks.shape[:-1]:
            raise CheckpointError(
                f"{scales.file}: {scales.name} {scales.stored} {list(scales.shape)}: must be U8 {list(blocks.shape[:-1])}, "
                "one exponent a group of its blocks."
            )
        experts, rows, groups, _ = blocks.shape
        shape, read = (
            (experts, 2 * _MX_GROUP_BYTES * groups, rows),
            partial(_read_mxfp4, blocks, scales),
        )
        found[name] = StoredTensor(
            blocks.name.removesuffix("_blocks"), shape, MXFP4, dtype, blocks.file, read
        )
    return found


def _read_mxfp4(blocks: StoredTensor, scales: StoredTensor, out: np.ndarray) -> None:
    experts, rows, groups, _ = blocks.shape
    for expert, part in itertools.product(
        range(experts), chunks(rows, 4 * 2 * _MX_GROUP_BYTES * groups)
    ):
        codes = np.empty((part.stop - part.start, groups, _MX_GROUP_BYTES), np.uint8)
        exponents = np.empty((part.stop - part.start, groups, 1), np.uint8)
        first = (expert * rows + part.start) * groups
        read_exactly(blocks.file, blocks.offset + first * _MX_GROUP_BYTES, codes)
        read_exactly(scales.file, scales.offset + first, exponents)
        if (exponents == 255).any():
            raise CheckpointError(
                f"{scales.file}: {scales.name} holds 255, the exponent that means NaN: damaged."
            )
        values = _E2M1_PAIRS[codes].reshape(len(codes), groups, -1)
        with np.errstate(over="ignore"):  # checked below
            real = np.ldexp(values, exponents.astype(np.int32) - 127).reshape(len(codes), -1)
            out[expert][:, part] = real.T
        _require_finite(blocks, values, out[expert][:, part])
