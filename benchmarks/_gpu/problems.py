"""The timed attention problems: pools of several layers, and each call uses the next layer."""

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
from pallas_kernels import LayerView, paged_decode, paged_decode_mosaic, paged_prefill
from pallas_kernels.kernel_inputs import HOPPER
from pallas_kernels.paged_decode.blocks import decode_key
from pallas_kernels.paged_prefill.blocks import prefill_key

ELEMENTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
}
BITS = {1: jnp.uint8, 2: jnp.uint16}
TENSOR, TOKEN_HEAD, NONE = "tensor", "token_head", "none"  # scales


@dataclass(frozen=True)
class Shape:
    """Requests of `length` cached tokens each, and the heads of a model."""

    name: str
    requests: int
    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    @classmethod
    def all(cls, config: dict[str, Any], part: str) -> list["Shape"]:
        """Return the shapes that the config lists for a part."""
        return [cls(name=name, **(config["heads"] | sizes)) for name, sizes in config[part].items()]

    @property
    def pages(self) -> int:
        """Pages per request."""
        return -(-self.length // self.page_size)

    @property
    def rows(self) -> int:
        """Pages of all requests."""
        return self.requests * self.pages

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def cache_bytes(self, element: str, scales: str = NONE) -> int:
        """Return the bytes of keys, values and exponents that a decode must read."""
        token_heads = self.requests * self.length * self.kv_heads
        row_bytes = self.head_dim * np.dtype(ELEMENTS[element]).itemsize + (scales == TOKEN_HEAD)
        return 2 * token_heads * row_bytes

    def prefill_flop(self) -> int:
        """Return the FLOP of causal attention of every token: two matmuls."""
        scores = self.length * (self.length + 1) // 2
        return 4 * self.requests * self.q_heads * self.head_dim * scores


@dataclass(frozen=True)
class Attention:
    """Attention of one shape and element type: of every token (`prefill`) or of the last ones."""

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
        """Element type of the cache."""
        return np.dtype(ELEMENTS[self.element])

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        if self.mosaic:
            return "paged_decode_mosaic"
        return "paged_prefill" if self.prefill else "paged_decode"

    @property
    def tuning_key(self) -> str:
        """Key of the problem in the table of tuned blocks."""
        s = self.shape
        heads = {
            "kv_heads": s.kv_heads,
            "group": s.group,
            "head_dim": s.head_dim,
            "element": self.dtype,
        }
        if self.prefill:
            return prefill_key(queries=s.requests * s.length, **heads)
        return decode_key(requests=s.requests, **heads)

    @cached_property
    def work(self) -> Work:
        """The timed function. The output of a call is the queries of the next."""
        return Work(self._step, copies=copies(self.shape.cache_bytes(self.element), self.rotation))

    def arrays(self) -> tuple[jax.Array, dict[str, Any]]:
        """Return `carry` and `rest` on the device."""
        return _arrays(replace(self, blocks=None, mosaic=False))

    def carry(self) -> jax.Array:
        """Return queries. Traceable, like `rest`."""
        s = self.shape
        size = (s.requests * s.length if self.prefill else s.requests, s.q_heads, s.head_dim)
        return jax.random.normal(jax.random.key(1), size, jnp.bfloat16)

    def rest(self) -> dict[str, Any]:
        """Return pools with a layer per copy, a shuffled page table, and scales."""
        s = self.shape
        rows = s.rows * self.work.copies
        size = (rows, s.kv_heads, s.page_size, s.head_dim)
        keys = jax.random.split(jax.random.key(2, impl="rbg"), 5)
        pages = jax.random.permutation(keys[2], jnp.arange(s.rows, dtype=jnp.int32))
        rest = {
            "k_pages": random_bits(keys[0], size, self.dtype),
            "v_pages": random_bits(keys[1], size, self.dtype),
            "page_table": pages.reshape(s.requests, s.pages),
            "lengths": jnp.full(s.requests, s.length, jnp.int32),
        }
        if self.prefill:
            rest["first_query"] = s.length * jnp.arange(s.requests, dtype=jnp.int32)
            rest["queries"] = rest["lengths"]
        if self.scales == TENSOR:
            rest["k_scale"] = jnp.full((s.kv_heads, s.head_dim), 0.75)
            rest["v_scale"] = rest["k_scale"]
        if self.scales == TOKEN_HEAD:
            for name, key in (("k_exponent", keys[3]), ("v_exponent", keys[4])):
                exponents = jax.random.randint(key, size[:3], 124, 130, jnp.int32)
                rest[name] = exponents.astype(jnp.uint8)
        return rest

    def _step(self, q: jax.Array, rest: dict[str, Any], copy: jax.Array) -> jax.Array:
        rest = rest | {"first_row": jnp.asarray(copy, jnp.int32) * self.shape.rows}
        fields = {name: rest.pop(name) for name in LayerView._fields if name in rest}
        view = LayerView(**fields)
        if self.mosaic:
            return paged_decode_mosaic(
                q, view, **rest, element=self.dtype, interpret=self.interpret
            )
        attend = paged_prefill if self.prefill else paged_decode
        return attend(
            q,
            view,
            **rest,
            element=self.dtype,
            blocks=self.blocks,
            capability=capability(),
            interpret=self.interpret,
        )


@functools.partial(jax.jit, static_argnums=0)
def _arrays(problem: Attention) -> tuple[jax.Array, dict[str, Any]]:
    """Return the arrays of a problem; compiled once for all block sizes."""
    return problem.carry(), problem.rest()


def copies(size: int, rotation: int) -> int:
    """Return how many copies of `size` bytes exceed the L2 cache: together, `rotation` bytes."""
    return max(1, math.ceil(rotation / max(1, size)))


def capability() -> tuple[int, int]:
    """Return the compute capability of the device, or Hopper's where kernels are interpreted."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    if found is None:
        return HOPPER
    major, minor = (int(part) for part in found.split("."))
    return major, minor


def random_bits(key: jax.Array, size: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Return the stored bits of normal random numbers."""
    values = jax.random.normal(key, size, jnp.bfloat16).astype(dtype)
    return lax.bitcast_convert_type(values, BITS[dtype.itemsize])
