"""Types of public arguments, for signatures and option classes. Importing it does not load JAX."""

import os
import typing
from typing import Any, Literal, TypeAlias

import numpy as np

PathLike: TypeAlias = str | os.PathLike[str]

KVDtypeName: TypeAlias = Literal[
    "auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2"
]
KV_DTYPES: tuple[str, ...] = typing.get_args(KVDtypeName)

KVScalesName: TypeAlias = Literal["auto", "checkpoint", "unit", "token_head"]
KV_SCALES: tuple[str, ...] = typing.get_args(KVScalesName)

AttentionName: TypeAlias = Literal["pallas", "xla", "reference", "pallas_interpret"]
ATTENTIONS: tuple[str, ...] = typing.get_args(AttentionName)

WeightsDtypeName: TypeAlias = Literal["bfloat16", "float16", "float32"]
WeightsDtype: TypeAlias = WeightsDtypeName | np.dtype[Any] | type[np.generic]
