"""What is timed: attention over pools of several layers, each call in the next of them, as a model's layers are."""

import functools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from benchmarks._gpu.timing import Work
from pallas_kernels import paged_decode, paged_decode_mosaic, paged_prefill
from pallas_kernels.options import HOPPER
from pallas_kernels.paged_decode.blocks import problem_class as decode_class
from pallas_kernels.paged_prefill.blocks import problem_class as prefill_class

ELEMENTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
}
BITS = {1: jnp.uint8, 2: jnp.uint16}
TENSOR, TOKEN_HEAD, NONE = "tensor", "token_head", "none"  # scales


@dataclass(frozen=True)
class Shape:
    """Requests of `length` tokens each, all in the cache, and the heads of a model."""

    name: str
    requests: int
    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    @classmethod
    def all(cls, config: dict[str, Any], part: str) -> list["Shape"]:
        """The shapes that the config lists for a part."""
        return [cls(name=name, **(config["heads"] | sizes)) for name, sizes in config[part].items()]

    @property
    def pages(self) -> int:
        """Pages of one request."""
        return -(-self.length // self.page_size)

    @property
    def rows(self) -> int:
        """Pages of all requests."""
        return self.requests * self.pages

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    def cache_bytes(self, element: str, scales: str = NONE) -> int:
        """Bytes of keys and values that a decode must read, exponents included."""
        token_heads = self.requests * self.length * self.kv_heads
        return (
            2
            * token_heads
            * (self.head_dim * np.dtype(ELEMENTS[element]).itemsize + (scales == TOKEN_HEAD))
        )

    def prefill_flop(self) -> int:
        """Floating-point operations of causal attention of every token: two products, a multiply and an add each."""
        return (
            4
            * self.requests
            * self.q_heads
            * self.head_dim
            * (self.length * (self.length + 1) // 2)
        )


@dataclass(frozen=True)
class Attention:
    """Attention of one shape over pages of one element: of every token (`prefill`) or of the last ones."""

    shape: Shape
    element: str
    scales: str
    prefill: bool
    rotation: int
    interpret: bool
    blocks: Any = None
    mosaic: bool = False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ELEMENTS[self.element])

    @property
    def kernel(self) -> str:
        return (
            "paged_decode_mosaic"
            if self.mosaic
            else "paged_prefill"
            if self.prefill
            else "paged_decode"
        )

    @property
    def block_class(self) -> str:
        """What blocks are tuned for."""
        s = self.shape
        heads = {
            "kv_heads": s.kv_heads,
            "group": s.group,
            "head_dim": s.head_dim,
            "element": self.dtype,
        }
        return (
            prefill_class(queries=s.requests * s.length, **heads)
            if self.prefill
            else decode_class(requests=s.requests, **heads)
        )

    @cached_property
    def work(self) -> Work:
        """A call gives the next its queries."""
        return Work(self._step, turns=turns(self.shape.cache_bytes(self.element), self.rotation))

    def arrays(self) -> tuple[jax.Array, dict[str, Any]]:
        """`carry` and `rest` on the device."""
        return _arrays(replace(self, blocks=None, mosaic=False))

    def carry(self) -> jax.Array:
        """Queries. Under `jax.eval_shape` their shape alone, and likewise for `rest`."""
        s = self.shape
        size = (s.requests * s.length if self.prefill else s.requests, s.q_heads, s.head_dim)
        return jax.random.normal(jax.random.key(1), size, jnp.bfloat16)

    def rest(self) -> dict[str, Any]:
        """Pools of as many layers as there are turns, pages in any order, and scales."""
        s, rows = self.shape, self.shape.rows * self.work.turns
        size = (rows, s.kv_heads, s.page_size, s.head_dim)
        keys = jax.random.split(jax.random.key(2, impl="rbg"), 5)
        rest = {
            "k_pages": random_bits(keys[0], size, self.dtype),
            "v_pages": random_bits(keys[1], size, self.dtype),
            "page_table": jax.random.permutation(
                keys[2], jnp.arange(s.rows, dtype=jnp.int32)
            ).reshape(s.requests, s.pages),
            "lengths": jnp.full(s.requests, s.length, jnp.int32),
        }
        if self.prefill:
            rest["first_query"] = s.length * jnp.arange(s.requests, dtype=jnp.int32)
            rest["queries"] = rest["lengths"]
        if self.scales == TENSOR:
            rest |= {
                name: jnp.full((s.kv_heads, s.head_dim), 0.75) for name in ("k_scale", "v_scale")
            }
        if self.scales == TOKEN_HEAD:
            exponents = (jax.random.randint(key, size[:3], 124, 130, jnp.int32) for key in keys[3:])
            rest |= {
                f"{name}_exponent": e.astype(jnp.uint8)
                for name, e in zip("kv", exponents, strict=True)
            }
        return rest

    def _step(self, q: jax.Array, rest: dict[str, Any], turn: jax.Array) -> jax.Array:
        if self.mosaic:
            first_row = jnp.asarray(turn, jnp.int32) * self.shape.rows
            return paged_decode_mosaic(
                q, **rest, element=self.dtype, first_row=first_row, interpret=self.interpret
            )
        attend = paged_prefill if self.prefill else paged_decode
        first_row = jnp.asarray(turn, jnp.int32) * self.shape.rows
        how = {
            "element": self.dtype,
            "capability": capability(),
            "blocks": self.blocks,
            "interpret": self.interpret,
        }
        return attend(q, **rest, first_row=first_row, **how)


@functools.partial(jax.jit, static_argnums=0)
def _arrays(one: Attention) -> tuple[jax.Array, dict[str, Any]]:
    """Compiled once for all blocks that are tried."""
    return one.carry(), one.rest()


def turns(size: int, rotation: int) -> int:
    """Copies of data of `size` bytes such that a call's is out of the L2 cache when its turn comes again."""
    return max(1, math.ceil(rotation / max(1, size)))


def capability() -> tuple[int, int]:
    """The device's compute capability; what kernels are made for, where they are interpreted."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    return HOPPER if found is None else tuple(int(part) for part in found.split("."))


def random_bits(key: jax.Array, size: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Stored bits of normal numbers."""
    return lax.bitcast_convert_type(
        jax.random.normal(key, size, jnp.bfloat16).astype(dtype), BITS[dtype.itemsize]
    )
