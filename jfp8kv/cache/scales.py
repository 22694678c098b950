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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.core.formats import KVFormat

UNIT, TOKEN_HEAD = "unit", "token_head"
NAMED = ("auto", "checkpoint", UNIT, TOKEN_HEAD)


class KVScales:
    """Static scales of every layer: `k` and `v`, float32, broadcastable to `[layers, kv_heads, head_dim]`.

    `[layers, 1, 1]` is one scale per tensor, `[layers, kv_heads, 1]` per head, `[layers, kv_heads, head_dim]` per channel.
    Raises `ConfigError` for a scale that is not positive and finite, naming the layer. Compared by identity.
    """

    def __init__(self, k: np.ndarray, v: np.ndarray):
        self.k = _checked("k", k)
        self.v = _checked("v", v)
        if len(self.k) != len(self.v):
            raise ConfigError(f"K scales for {len(self.k)} layers and V scales for {len(self.v)}: must be the same number.")

    def __repr__(self) -> str:
        return f"KVScales(layers={len(self.k)}, granularity={self.granularity!r})"

    @property
    def granularity(self) -> str:
        """ "tensor", "head" or "channel": the finer of K's and V's."""
        shape = np.maximum(self.k.shape, self.v.shape)
        return "channel" if shape[2] > 1 else "head" if shape[1] > 1 else "tensor"

    @classmethod
    def unit(cls, layers: int) -> "KVScales":
        """Scale 1 everywhere: values are stored as they are."""
        return cls(np.ones((layers, 1, 1), np.float32), np.ones((layers, 1, 1), np.float32))

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` as a safetensors file holding `k`, `v` and their granularity."""
        from safetensors.numpy import save_file

        about = json.dumps({"format": "jfp8kv.KVScales", "granularity": self.granularity})
        save_file({"k": self.k, "v": self.v}, str(path), metadata={"jfp8kv": about})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KVScales":
        """Read what `save` wrote. Raises `CheckpointError` for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not Path(path).is_file():
            raise CheckpointError(f"kv_scales={str(path)!r}: no such file. Write one with KVScales.save(path).")
        try:
            tensors = load_file(str(path))
            return cls(tensors["k"], tensors["v"])
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"kv_scales={str(path)!r}: not a KVScales file ({error}).") from error


jax.tree_util.register_pytree_node(KVScales, lambda s: ((s.k, s.v), None), lambda _, kv: _unchecked(*kv))


def _unchecked(k: object, v: object) -> KVScales:
    """JAX may rebuild the tree around anything (tracers, None): no checks there."""
    scales = object.__new__(KVScales)
    scales.k, scales.v = k, v  # type: ignore[assignment]
    return scales


def _checked(name: str, value: object) -> np.ndarray:
    value = np.array(value, np.float32, order="C")  # a copy of our own, laid out as files want it
    if value.ndim != 3 or (value.shape[2] > 1 and value.shape[1] == 1):
        raise ConfigError(
            f"{name} scales of shape {value.shape}: must be [layers, 1, 1] (tensor), [layers, kv_heads, 1] (head) "
            "or [layers, kv_heads, head_dim] (channel)."
        )
    bad = ~(np.isfinite(value) & (value > 0))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ConfigError(f"{name} scale of layer {at[0]} is {value[at]}: scales must be positive and finite.")
    return value


def check_shape(scales: KVScales, *, layers: int, kv_heads: int, head_dim: int) -> None:
    """Raise `ConfigError` unless the scales belong to a model of these sizes."""
    full = (layers, kv_heads, head_dim)
    for name, value in (("k", scales.k), ("v", scales.v)):
        if value.shape[0] != layers or any(s not in (1, f) for s, f in zip(value.shape, full, strict=True)):
            raise ConfigError(
                f"{name} scales of shape {value.shape} do not fit a model with layers={layers}, kv_heads={kv_heads}, "
                f"head_dim={head_dim}: must be [{layers}, 1, 1], [{layers}, {kv_heads}, 1] or {list(full)}."
            )


def token_head_exponent(x: Float[Array, "*tokens head_dim"], fmt: KVFormat) -> UInt8[Array, "*tokens"]:
    """Exponent (biased by 127) of the smallest power of two `s` with `amax(|x|) <= fmt.largest * s`.

    The amax runs over finite values: infinities saturate and NaN stays NaN, neither spoils its neighbours. Zero rows get the
    smallest exponent, 1.
    """
    finite = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.float32(0))
    amax = lax.bitcast_convert_type(jnp.max(finite, axis=-1), jnp.uint32)
    largest = np.float32(fmt.largest).view(np.uint32)
    below = (amax & jnp.uint32(0x7FFFFF)) <= jnp.uint32(largest & 0x7FFFFF)  # mantissa fits under the largest value's
    exponent = (amax >> 23).astype(jnp.int32) - int(largest >> 23) + 127 + jnp.where(below, 0, 1).astype(jnp.int32)
    return jnp.maximum(exponent, 1).astype(jnp.uint8)


def exponent_scale(exponent: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The power of two with this biased exponent: `2 ** (exponent - 127)`."""
    return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def exponent_inverse(exponent: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """One over `exponent_scale`, exactly."""
    return lax.bitcast_convert_type((jnp.uint32(254) - exponent.astype(jnp.uint32)) << 23, jnp.float32)
