"""Scales: what turns stored numbers into real ones. `real = stored * scale`.

Static scales (`KVScales`) are known before the first token: one per layer (tensor), per KV head, or per channel. They never
touch the cache: K's fold into the query, V's into the output.

Dynamic scales (`kv_scales="token_head"`) are one per token and KV head, found when the token is written and stored beside its
page. They are powers of two, kept as their exponent in one byte (the E8M0 of OCP Microscaling Formats 1.0, section 5.4.1): a
floating-point element loses nothing to a coarse scale but a bit of range below, and dividing by a power of two is exact, so
every backend stores the same bytes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.core.types import KV_SCALES
from pallas_kernels import elements

UNIT, TOKEN_HEAD = "unit", "token_head"
SCALE_NAMES = KV_SCALES


class KVScales:
    """Static scales of every layer: `k` and `v`, float32, broadcastable to `[layers, kv_heads, head_dim]`.

    `[layers, 1, 1]` is one scale per tensor, `[layers, kv_heads, 1]` per head, `[layers, kv_heads, head_dim]` per channel.
    `k_offset`, of the same shapes, is subtracted from keys (after RoPE) before they are scaled, or None: the scores of a query
    all move alike, which its softmax does not see. `kv_dtype` says what format the scales were made for; None is whatever cache
    they are given to. Raises `ConfigError` for a scale that is not positive and finite, naming the layer. Compared by identity.
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
                f"K scales for {len(self.k)} layers and V scales for {len(self.v)}: must be the same number."
            )
        if self.k_offset is not None and len(self.k) != len(self.k_offset):
            raise ConfigError(
                f"K scales for {len(self.k)} layers and K offsets for {len(self.k_offset)}: must be the same number."
            )

    def __repr__(self) -> str:
        made_for = f", kv_dtype={self.kv_dtype!r}" if self.kv_dtype else ""
        offset = ", with K offsets" if self.k_offset is not None else ""
        return f"KVScales(layers={len(self.k)}, granularity={self.granularity!r}{made_for}{offset})"

    @property
    def granularity(self) -> str:
        """ "tensor", "head" or "channel": the finer of K's and V's."""
        shape = np.maximum(self.k.shape, self.v.shape)
        return "channel" if shape[2] > 1 else "head" if shape[1] > 1 else "tensor"

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """`k`, `v` and `k_offset` if there is one, by name."""
        found = {"k": self.k, "v": self.v, "k_offset": self.k_offset}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def unit(cls, layers: int) -> "KVScales":
        """Scale 1 everywhere: values are stored as they are."""
        return cls(np.ones((layers, 1, 1), np.float32), np.ones((layers, 1, 1), np.float32))

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` as a safetensors file holding `k`, `v`, `k_offset` if there is one, and what they are."""
        from safetensors.numpy import save  # `save_file` makes files that nobody else may read

        about = json.dumps(
            {
                "format": "jfp8kv.KVScales",
                "granularity": self.granularity,
                "kv_dtype": self.kv_dtype,
            }
        )
        Path(path).write_bytes(save(self.arrays, metadata={"jfp8kv": about}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KVScales":
        """Read what `save` wrote. Raises `CheckpointError` for anything else."""
        tensors, about = read_own_file(path, "kv_scales", "KVScales")
        return cls.of(tensors, about.get("kv_dtype"))

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], kv_dtype: str | None) -> "KVScales":
        """From what `arrays` gives."""
        return cls(arrays["k"], arrays["v"], arrays.get("k_offset"), kv_dtype)


def read_own_file(
    path: str | os.PathLike, what: str, kind: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a safetensors file that `kind.save` wrote, and what is said of them. Raises `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(
            f"{what}={str(path)!r}: no such file. Write one with {kind}.save(path)."
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("jfp8kv", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{what}={str(path)!r}: not a {kind} file ({error}).") from error
    if missing := [name for name in "kv" if name not in arrays]:
        raise CheckpointError(
            f"{what}={str(path)!r}: not a {kind} file (it holds no {' and no '.join(map(repr, missing))})."
        )
    if about.get("format", f"jfp8kv.{kind}") != f"jfp8kv.{kind}":
        raise CheckpointError(
            f"{what}={str(path)!r}: a {about['format']} file, not a jfp8kv.{kind}."
        )
    return arrays, about


jax.tree_util.register_pytree_node(
    KVScales,
    lambda s: ((s.k, s.v, s.k_offset), s.kv_dtype),
    lambda kv_dtype, children: _unchecked(kv_dtype, *children),
)


def _unchecked(kv_dtype: str | None, k: object, v: object, k_offset: object) -> KVScales:
    """JAX may rebuild the tree around anything (tracers, None): no checks there."""
    scales = object.__new__(KVScales)
    scales.k, scales.v, scales.k_offset, scales.kv_dtype = k, v, k_offset, kv_dtype  # type: ignore[assignment]
    return scales


def _shaped(name: str, value: object) -> np.ndarray:
    value = np.array(value, np.float32, order="C")  # a copy of our own, laid out as files want it
    if value.ndim != 3:
        raise ConfigError(
            f"{name} scales of shape {value.shape}: must be [layers, 1, 1] (tensor), [layers, kv_heads, 1] (head) "
            "or [layers, kv_heads, head_dim] (channel)."
        )
    return value


def _positive(name: str, value: object) -> np.ndarray:
    value = _shaped(name, value)
    _refuse(
        ~(np.isfinite(value) & (value > 0)),
        value,
        f"{name} scale",
        "scales must be positive and finite",
    )
    return value


def _finite(name: str, value: object) -> np.ndarray:
    value = _shaped(name, value)
    _refuse(~np.isfinite(value), value, name, "offsets must be finite")
    return value


def _refuse(bad: np.ndarray, value: np.ndarray, what: str, rule: str) -> None:
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ConfigError(f"{what} of layer {at[0]} is {value[at]}: {rule}.")


def check_shape(scales: KVScales, *, layers: int, kv_heads: int, head_dim: int) -> None:
    """Raise `ConfigError` unless the scales belong to a model of these sizes."""
    shapes = ((layers, 1, 1), (layers, kv_heads, 1), (layers, kv_heads, head_dim))
    for name, value in scales.arrays.items():
        if value.shape not in shapes:
            raise ConfigError(
                f"{name} scales of shape {value.shape} do not fit a model with layers={layers}, kv_heads={kv_heads}, "
                f"head_dim={head_dim}: must be {', '.join(str(list(shape)) for shape in shapes[:-1])} or {list(shapes[-1])}."
            )


def token_head_exponent(
    x: Float[Array, "*tokens head_dim"], fmt: KVFormat
) -> UInt8[Array, "*tokens"]:
    """Exponent (biased by 127) of the smallest power of two `s` with `amax(|x|) <= fmt.largest * s`.

    The amax runs over finite values: infinities saturate and NaN stays NaN, neither spoils its neighbours. Zero rows get the
    smallest exponent, 1.
    """
    exponent = elements.token_head_exponent(x.astype(jnp.float32), fmt.dtype)
    return exponent.astype(jnp.uint8)


def exponent_scale(exponent: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The power of two with this biased exponent: `2 ** (exponent - 127)`."""
    return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def exponent_inverse(exponent: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """One over `exponent_scale`, exactly."""
    return lax.bitcast_convert_type(
        (jnp.uint32(254) - exponent.astype(jnp.uint32)) << 23, jnp.float32
    )
