"""Random paged batches for the attention kernels, and the comparison of kernels and references.

For tests and benchmarks.

Pools have two layers of pages; the batch belongs to the second. Slots without a token have NaN
codes and exponents of 255, and unused entries of the page table are far outside the pool, so any
read of unwritten memory shows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import DecodeBlocks, LayerView, PrefillBlocks, paged_decode, paged_prefill
from pallas_kernels.error_bound import paged_decode_reference, paged_prefill_reference
from pallas_kernels.fp8 import E4M3

NAN_CODE: dict[int, np.generic] = {1: np.uint8(0xFF), 2: np.uint16(0xFFFF), 4: np.float32(np.nan)}
KERNELS: dict[str, Callable[..., Any]] = {"decode": paged_decode, "prefill": paged_prefill}
REFERENCES: dict[str, Callable[..., Any]] = {
    "decode": paged_decode_reference,
    "prefill": paged_prefill_reference,
}
BLOCKS = {"decode": DecodeBlocks(16, 4, 1, 2), "prefill": PrefillBlocks(16, 16, 4, 1)}
OUTSIDE = 1 << 20  # a page number past the end of every pool
STATIC = ("sm_scale", "softcap", "capability")
LENGTHS = (0, 1, 4, 5, 6, 13, 0, 23)
QUERIES = (0, 1, 4, 1, 0, 9, 0, 2)  # query tokens of the requests in prefill


class Batch:
    """A random batch for both kernels."""

    def __init__(
        self,
        *,
        element: np.dtype = E4M3,
        q_dtype: Any = jnp.float32,
        kv_heads: int = 2,
        group: int = 3,
        head_dim: int = 32,
        page_size: int = 4,
        lengths: tuple[int, ...] = LENGTHS,
        queries: tuple[int, ...] | None = None,
        dynamic: bool = False,
        static: tuple[float, float] | None = None,
        spread: int = 3,
        tokens: int | None = None,
        num_pages: int | None = None,
        seed: int = 0,
        **options: Any,
    ):
        """Create a batch.

        Args:
          element: element type of the cache.
          q_dtype: dtype of the queries.
          kv_heads: KV heads.
          group: query heads per KV head.
          head_dim: channels per head.
          page_size: tokens per page.
          lengths: tokens of each request in the cache.
          queries: query tokens of each request in prefill; up to `QUERIES` if None.
          dynamic: create dynamic scales.
          static: magnitudes of static K and V scales.
          spread: range of the exponents of dynamic scales.
          tokens: rows of `q` in prefill.
          num_pages: pages per layer.
          seed: of the random numbers.
          **options: arguments of the kernels; `sinks` and `score_offset` are the magnitudes of
            random arrays.
        """
        self.rng = rng = np.random.default_rng(seed)
        self.element = np.dtype(element)
        self.q_dtype = q_dtype
        self.kv_heads = kv_heads
        self.q_heads = kv_heads * group
        self.head_dim = head_dim
        self.page_size = page_size
        self.lengths = np.asarray(lengths, np.int32)
        chunks = np.minimum(QUERIES, lengths) if queries is None else queries
        self.queries = np.asarray(chunks, np.int32)
        self.options = options
        self.tokens = int(self.queries.sum()) + len(lengths) + 1 if tokens is None else tokens
        self.first_query = self._shuffle_chunks()

        used = -(-self.lengths // page_size)
        self.num_pages = int(used.sum()) + 2 if num_pages is None else num_pages
        self.page_table = np.full((len(lengths), self.num_pages), OUTSIDE, np.int32)
        # The last page is empty: reads from outside are clamped to it.
        order = iter(rng.permutation(self.num_pages - 1))
        for request, n in enumerate(used):
            self.page_table[request, :n] = [next(order) for _ in range(n)]

        self.first_row = self.num_pages
        shape = (2 * self.num_pages, kv_heads, page_size, head_dim)
        written = self._written()
        self.k_pages, self.v_pages = (self._bits(rng.normal(size=shape), written) for _ in range(2))
        if dynamic:
            for name in ("k_exponent", "v_exponent"):
                exponents = rng.integers(127 - spread, 128, shape[:3]).astype(np.uint8)
                self.options[name] = np.where(written[:, None], exponents, np.uint8(255))
        if static is not None:
            for name, scale in zip(("k_scale", "v_scale"), static, strict=True):
                self.options[name] = np.float32(scale * rng.uniform(0.5, 2, (kv_heads, head_dim)))
        self.q = rng.normal(size=(self.tokens, self.q_heads, head_dim))
        self.decode_q = rng.normal(size=(len(lengths), self.q_heads, head_dim))

    def _shuffle_chunks(self) -> np.ndarray:
        """Return the first query of each request: shuffled chunks, with padding between them."""
        requests = len(self.lengths)
        padding = self.tokens - self.queries.sum()
        gaps = self.rng.multinomial(padding, np.ones(requests + 1) / (requests + 1))
        first_query = np.zeros(requests, np.int32)
        first = 0
        for request, gap in zip(self.rng.permutation(requests), gaps, strict=False):
            first_query[request] = first + gap
            first = first_query[request] + self.queries[request]
        return first_query

    def slot(self, request: int, token: int) -> tuple[int, slice, int]:
        """Return the index of a token of a request in the pools."""
        page = self.page_table[request, token // self.page_size]
        return int(self.first_row + page), slice(None), token % self.page_size

    def _written(self) -> np.ndarray:
        """Return which slots have a token, `[rows, page_size]`."""
        written = np.zeros((2 * self.num_pages, self.page_size), bool)
        for request, length in enumerate(self.lengths):
            for token in range(length):
                row, _, slot = self.slot(request, token)
                written[row, slot] = True
        return written

    def _bits(self, x: np.ndarray, written: np.ndarray) -> np.ndarray:
        code = NAN_CODE[self.element.itemsize]
        return np.where(written[:, None, :, None], x.astype(self.element).view(code.dtype), code)

    def poison(self, request: int, tokens: range) -> None:
        """Overwrite the slots of these tokens with NaN codes and NaN exponents."""
        for slot in (self.slot(request, token) for token in tokens):
            for pages in (self.k_pages, self.v_pages):
                pages[slot] = NAN_CODE[self.element.itemsize]
            for name in ("k_exponent", "v_exponent"):
                if name in self.options:
                    self.options[name][slot] = 255

    def arguments(self, kernel: str, **options: Any) -> dict[str, Any]:
        """Return the arguments of the kernel or its reference by name, `LayerView` flattened."""
        q = self.q if kernel == "prefill" else self.decode_q
        arguments = {
            "q": np.asarray(jnp.asarray(q, self.q_dtype)),
            "k_pages": self.k_pages,
            "v_pages": self.v_pages,
            "page_table": self.page_table,
            "lengths": self.lengths,
            "first_row": self.first_row,
        }
        if kernel == "prefill":
            arguments |= {"first_query": self.first_query, "queries": self.queries}
        given = self.options | options
        if "score_offset" in given:
            offset = given["score_offset"] * self.rng.normal(size=q.shape[:2])
            given["score_offset"] = np.float32(offset)
        if "sinks" in given:
            given["sinks"] = np.float32(given["sinks"] * self.rng.normal(size=self.q_heads))
        return arguments | given

    def run(self, kernel: str, arguments: dict[str, Any], blocks: Any) -> np.ndarray:
        """Return the output of the interpreted kernel."""
        arrays = {name: jnp.asarray(x) for name, x in arguments.items() if name not in STATIC}
        static = tuple((name, arguments[name]) for name in STATIC if name in arguments)
        return np.asarray(compiled(kernel, self.element, blocks, static)(arrays))

    def check(self, kernel: str, *, blocks: Any = None, **options: Any) -> float:
        """Compare the kernel with its reference, and return the largest fraction of the bound."""
        arguments = self.arguments(kernel, **options)
        out = self.run(kernel, arguments, blocks or BLOCKS[kernel])
        return self.compare(kernel, out, arguments)

    def compare(self, kernel: str, got: Any, arguments: dict[str, Any]) -> float:
        """Compare an output with the reference, and return the largest fraction of the bound."""
        want, bound = REFERENCES[kernel](**as_view(arguments), element=self.element)
        got = np.asarray(got).astype(np.float64)
        assert np.array_equal(np.isnan(got), np.isnan(want)), "NaN in different places"
        fraction = np.abs(got - want) / np.maximum(bound, 1e-300)
        assert np.all((np.abs(got - want) <= bound) | np.isnan(want)), (
            f"{np.nanmax(fraction):.3g} times the bound"
        )
        return float(np.nanmax(fraction))


def as_view(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the fields of `LayerView` combined into `kv`.

    References take no `capability`.
    """
    fields = {name: x for name, x in arguments.items() if name in LayerView._fields}
    others = {n: x for n, x in arguments.items() if n not in fields and n != "capability"}
    return others | {"kv": LayerView(**fields)}


def call(kernel: str, arguments: dict[str, Any], **options: Any) -> jax.Array:
    """Call the kernel, interpreted by default, with arguments by name."""
    given = {"blocks": BLOCKS[kernel], "interpret": True} | arguments | options
    capability = {"capability": given["capability"]} if "capability" in given else {}
    return KERNELS[kernel](**as_view(given), **capability)


@functools.cache
def compiled(
    kernel: str, element: np.dtype, blocks: Any, static: tuple[tuple[str, Any], ...]
) -> Any:
    """Return the kernel under `jit`, which compiles once for equal shapes and options."""
    return jax.jit(
        lambda arguments: call(kernel, arguments, element=element, blocks=blocks, **dict(static))
    )
