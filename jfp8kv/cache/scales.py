"""Scales of the KV cache: `real = stored * scale`.

Static scales (`KVScales`) are known before the first token: one per layer (tensor), per KV head, or
per channel. They are not stored in the cache: K scales fold into the query, V scales into the
output of attention.

Dynamic scales (`kv_scales="token_head"`) are one per token and KV head, computed when the token is
written and stored next to its page. They are powers of two, stored as their exponent in one byte
(E8M0 of OCP Microscaling Formats 1.0, section 5.4.1). Rounding the scale up to a power of two only
costs a floating-point element some range at the low end, and dividing by a power of two is exact,
so every backend stores the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.core.file_contents import describe_file
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.core.types import PathLike
from pallas_kernels import fp8

UNIT = "unit"
TOKEN_HEAD = "token_head"


class KVScales:
    """Static scales of every layer: `real = stored * scale`.

    The arrays have the shape `[layers, 1, 1]` (one scale per layer: granularity "tensor"),
    `[layers, kv_heads, 1]` ("head") or `[layers, kv_heads, head_dim]` ("channel"). Two instances
    are equal only if they are the same object.

    Args:
      k, v: scales of keys and values, stored as float32. They may have different granularities.
      k_offset: subtracted from keys (after RoPE) before they are scaled, in one of the shapes
        above; None for no offset. It shifts all scores of a query by the same amount, which a
        softmax ignores.
      kv_dtype: the FP8 format that the scales were computed for; None for the format of the cache.

    Raises `ConfigError` for another shape, and with the layer for a scale that is not positive and
    finite.

    Example:
      scales = KVScales(k=np.full((layers, 1, 1), 0.05), v=np.full((layers, 1, 1), 0.02))
      jfp8kv.generate(params, prompts, kv_dtype="fp8", kv_scales=scales)
      scales.save("scales.safetensors")
      jfp8kv.generate(params, prompts, kv_dtype="fp8", kv_scales="scales.safetensors")
    """

    def __init__(
        self,
        k: np.ndarray,
        v: np.ndarray,
        k_offset: np.ndarray | None = None,
        kv_dtype: str | None = None,
    ):
        self.k = _positive("k", k)
        self.v = _positive("v", v)
        self.k_offset = None if k_offset is None else _finite("k_offset", k_offset)
        self.kv_dtype = None if kv_dtype is None else kv_format(kv_dtype).name
        if len(self.k) != len(self.v):
            raise ConfigError(
                f"K scales for {len(self.k)} layers and V scales for {len(self.v)}: "
                "must be the same number."
            )
        if self.k_offset is not None and len(self.k) != len(self.k_offset):
            raise ConfigError(
                f"K scales for {len(self.k)} layers and K offsets for {len(self.k_offset)}: "
                "must be the same number."
            )

    def __repr__(self) -> str:
        kv_dtype = f", kv_dtype={self.kv_dtype!r}" if self.kv_dtype else ""
        offset = ", with K offsets" if self.k_offset is not None else ""
        return f"KVScales(layers={len(self.k)}, granularity={self.granularity!r}{kv_dtype}{offset})"

    @property
    def granularity(self) -> str:
        """The finer granularity of `k` and `v`: "tensor", "head" or "channel"."""
        _, kv_heads, head_dim = np.maximum(self.k.shape, self.v.shape)
        if head_dim > 1:
            return "channel"
        return "head" if kv_heads > 1 else "tensor"

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """`k`, `v`, and `k_offset` if there is one, by name."""
        arrays = {"k": self.k, "v": self.v}
        return arrays if self.k_offset is None else arrays | {"k_offset": self.k_offset}

    @classmethod
    def unit(cls, layers: int) -> "KVScales":
        """Return scale 1 for every layer."""
        return cls(np.ones((layers, 1, 1), np.float32), np.ones((layers, 1, 1), np.float32))

    def save(self, path: PathLike) -> None:
        """Write a safetensors file with the arrays, their granularity and `kv_dtype`."""
        metadata = {"granularity": self.granularity, "kv_dtype": self.kv_dtype}
        write_scale_file(path, "KVScales", self.arrays, metadata)

    @classmethod
    def load(cls, path: PathLike) -> "KVScales":
        """Read a file that `save` wrote. Raises `CheckpointError` for any other file."""
        arrays, metadata = read_scale_file(path, "kv_scales", "KVScales")
        return cls.from_arrays(arrays, metadata.get("kv_dtype"))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], kv_dtype: str | None) -> "KVScales":
        """Return the scales whose property `arrays` is `arrays`."""
        return cls(arrays["k"], arrays["v"], arrays.get("k_offset"), kv_dtype)


def write_scale_file(
    path: PathLike, class_name: str, arrays: dict[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Write the arrays and the metadata of a `KVScales` or `KVPlan` as a safetensors file."""
    from safetensors.numpy import save  # `save_file` creates files that only their owner can read

    about = json.dumps({"format": f"jfp8kv.{class_name}"} | dict(metadata))
    Path(path).write_bytes(save(arrays, metadata={"jfp8kv": about}))


def read_scale_file(
    path: PathLike, option: str, class_name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the metadata of a file that `write_scale_file` wrote.

    Raises `CheckpointError` for any other file. The message names `option` and `class_name`.
    """
    from safetensors import SafetensorError, safe_open

    given = f"{option}={str(path)!r}"
    if not Path(path).is_file():
        raise CheckpointError(f"{given}: no such file. Write one with {class_name}.save(path).")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("jfp8kv", "{}"))
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        reason = describe_file(Path(path)) or error
        raise CheckpointError(f"{given}: not a {class_name} file ({reason}).") from error
    if missing := [name for name in "kv" if name not in arrays]:
        raise CheckpointError(
            f"{given}: not a {class_name} file (missing {', '.join(map(repr, missing))})."
        )
    if metadata.get("format", f"jfp8kv.{class_name}") != f"jfp8kv.{class_name}":
        raise CheckpointError(f"{given}: a {metadata['format']} file, not a jfp8kv.{class_name}.")
    return arrays, metadata


jax.tree_util.register_pytree_node(
    KVScales,
    lambda s: ((s.k, s.v, s.k_offset), s.kv_dtype),
    lambda kv_dtype, children: _rebuild(kv_dtype, *children),
)


def _rebuild(kv_dtype: str | None, k: Any, v: Any, k_offset: Any) -> KVScales:
    """Return a pytree node without checking the leaves: JAX passes tracers, None and others."""
    scales = object.__new__(KVScales)
    scales.k = k
    scales.v = v
    scales.k_offset = k_offset
    scales.kv_dtype = kv_dtype
    return scales


def _shaped(name: str, value: object) -> np.ndarray:
    try:
        array = np.array(value, np.float32, order="C")  # a copy, in the memory order of files
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} scales must be an array of numbers: {error}.") from None
    if array.ndim != 3:
        raise ConfigError(
            f"{name} scales of shape {array.shape}: must be [layers, 1, 1] (tensor), "
            "[layers, kv_heads, 1] (head) or [layers, kv_heads, head_dim] (channel)."
        )
    return array


def _positive(name: str, value: object) -> np.ndarray:
    array = _shaped(name, value)
    invalid = ~(np.isfinite(array) & (array > 0))
    _refuse(invalid, array, f"{name} scale", "scales must be positive and finite")
    return array


def _finite(name: str, value: object) -> np.ndarray:
    array = _shaped(name, value)
    _refuse(~np.isfinite(array), array, name, "offsets must be finite")
    return array


def _refuse(invalid: np.ndarray, value: np.ndarray, what: str, rule: str) -> None:
    if invalid.any():
        at = tuple(int(i) for i in np.argwhere(invalid)[0])
        raise ConfigError(f"{what} of layer {at[0]} is {value[at]}: {rule}.")


def check_shape(scales: KVScales, *, layers: int, kv_heads: int, head_dim: int) -> None:
    """Raise `ConfigError` unless the scales fit a model of these sizes."""
    shapes = ((layers, 1, 1), (layers, kv_heads, 1), (layers, kv_heads, head_dim))
    for name, value in scales.arrays.items():
        if value.shape not in shapes:
            raise ConfigError(
                f"{name} scales of shape {value.shape} do not fit a model with layers={layers}, "
                f"kv_heads={kv_heads}, head_dim={head_dim}: must be {list(shapes[0])}, "
                f"{list(shapes[1])} or {list(shapes[2])}."
            )


def token_head_exponent(
    x: Float[Array, "*tokens head_dim"], fmt: KVFormat
) -> UInt8[Array, "*tokens"]:
    """Return the exponent (biased by 127) of the dynamic scale of each token and head.

    The scale is the smallest power of two `s` with `amax(|x|) <= fmt.largest * s`. The amax runs
    over finite values: infinities saturate and NaN stays NaN without changing other channels. Rows
    of zeros have the smallest exponent, 1.
    """
    exponent = fp8.token_head_exponent(x.astype(jnp.float32), fmt.dtype)
    return exponent.astype(jnp.uint8)


def exponent_scale(exponent: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return the scale of a biased exponent: `2 ** (exponent - 127)`."""
    return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def exponent_inverse(exponent: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return `1 / exponent_scale(exponent)`, exactly."""
    inverse = jnp.uint32(254) - exponent.astype(jnp.uint32)
    return lax.bitcast_convert_type(inverse << 23, jnp.float32)
