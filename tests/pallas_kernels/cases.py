"""Random paged batches for the attention kernels, and the check of a kernel against its reference.

Pools have two layers of pages; the layer at hand is the second. Slots that hold no token are NaN codes and exponents 255,
unused entries of the page table point far outside, and so nothing unwritten can be read without showing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import DecodeBlocks, PrefillBlocks, paged_decode, paged_prefill
from pallas_kernels.elements import E4M3
from pallas_kernels.paged_decode.reference import paged_decode_reference
from pallas_kernels.paged_prefill.reference import paged_prefill_reference

NAN_CODE = {1: np.uint8(0xFF), 2: np.uint16(0xFFFF), 4: np.float32(np.nan)}
KERNELS = {"decode": paged_decode, "prefill": paged_prefill}
REFERENCES = {"decode": paged_decode_reference, "prefill": paged_prefill_reference}
BLOCKS = {"decode": DecodeBlocks(16, 4, 1, 2), "prefill": PrefillBlocks(16, 16, 4, 1)}
OUTSIDE = 1 << 20  # a page that no pool has
STATIC = ("sm_scale", "softcap", "capability")
LENGTHS = (0, 1, 4, 5, 6, 13, 0, 23)
QUERIES = (0, 1, 4, 1, 0, 9, 0, 2)  # of which these are queries in prefill


class Batch:
    """A batch for both kernels: `decode` and `prefill` give outputs, `check_*` hold them against the references."""

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
        """`options` are those of the kernels, but that `sinks` and `score_offset` say how large random ones are."""
        self.rng = rng = np.random.default_rng(seed)
        self.element, self.q_dtype, self.kv_heads, self.q_heads = (
            np.dtype(element),
            q_dtype,
            kv_heads,
            kv_heads * group,
        )
        self.lengths, self.head_dim, self.page_size = np.int32(lengths), head_dim, page_size
        self.queries = np.int32(np.minimum(QUERIES, lengths) if queries is None else queries)
        self.options = options
        # Chunks lie in `q` in another order than their requests, with rows of no request before and between them.
        self.tokens = int(self.queries.sum()) + len(lengths) + 1 if tokens is None else tokens
        gaps = rng.multinomial(
            self.tokens - self.queries.sum(), np.ones(len(lengths) + 1) / (len(lengths) + 1)
        )
        self.first_query, first = np.zeros(len(lengths), np.int32), 0
        for request, gap in zip(rng.permutation(len(lengths)), gaps, strict=False):
            self.first_query[request] = first + gap
            first = self.first_query[request] + self.queries[request]

        used = -(-self.lengths // page_size)
        self.num_pages = int(used.sum()) + 2 if num_pages is None else num_pages
        self.page_table = np.full((len(lengths), self.num_pages), OUTSIDE, np.int32)
        order = iter(
            rng.permutation(self.num_pages - 1)
        )  # nothing is in the last page, where reads from outside would end
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

    def slot(self, request: int, token: int) -> tuple[int, slice, int]:
        """Where a token of a request lies in the pools."""
        page = self.page_table[request, token // self.page_size]
        return self.first_row + page, slice(None), token % self.page_size

    def _written(self) -> np.ndarray:
        """`[rows, page_size]`: which slots hold a token."""
        written = np.zeros((2 * self.num_pages, self.page_size), bool)
        for request, length in enumerate(self.lengths):
            for token in range(length):
                row, _, offset = self.slot(request, token)
                written[row, offset] = True
        return written

    def _bits(self, x: np.ndarray, written: np.ndarray) -> np.ndarray:
        code = NAN_CODE[self.element.itemsize]
        return np.where(written[:, None, :, None], x.astype(self.element).view(code.dtype), code)

    def hide(self, request: int, tokens: range) -> None:
        """Make the slots of these tokens NaN codes, and their scales."""
        for slot in (self.slot(request, token) for token in tokens):
            for pages in (self.k_pages, self.v_pages):
                pages[slot] = NAN_CODE[self.element.itemsize]
            for name in ("k_exponent", "v_exponent"):
                if name in self.options:
                    self.options[name][slot] = 255

    def arguments(self, kernel: str, **options: Any) -> dict[str, Any]:
        """Of the kernel or its reference, by name; NumPy arrays and ints."""
        q = self.q if kernel == "prefill" else self.decode_q
        same = {
            "q": np.asarray(jnp.asarray(q, self.q_dtype)),
            "k_pages": self.k_pages,
            "v_pages": self.v_pages,
            "page_table": self.page_table,
            "lengths": self.lengths,
            "first_row": self.first_row,
        }
        chunks = (
            {"first_query": self.first_query, "queries": self.queries}
            if kernel == "prefill"
            else {}
        )
        given = self.options | options
        if "score_offset" in given:
            given["score_offset"] = np.float32(
                given["score_offset"] * self.rng.normal(size=q.shape[:2])
            )
        if "sinks" in given:
            given["sinks"] = np.float32(given["sinks"] * self.rng.normal(size=self.q_heads))
        return same | chunks | given

    def run(self, kernel: str, arguments: dict[str, Any], blocks: Any) -> np.ndarray:
        given = {name: jnp.asarray(x) for name, x in arguments.items() if name not in STATIC}
        static = tuple((name, arguments[name]) for name in STATIC if name in arguments)
        return np.asarray(compiled(kernel, self.element, blocks, static)(given))

    def check(self, kernel: str, *, blocks: Any = None, **options: Any) -> float:
        """Hold the kernel's output against the reference; the largest part of the bound that is used."""
        arguments = self.arguments(kernel, **options)
        return self.compare(
            kernel, self.run(kernel, arguments, blocks or BLOCKS[kernel]), arguments
        )

    def compare(self, kernel: str, got: np.ndarray, arguments: dict[str, Any]) -> float:
        want, bound = REFERENCES[kernel](**arguments, element=self.element)
        got = np.asarray(got).astype(np.float64)
        assert np.array_equal(np.isnan(got), np.isnan(want)), (
            "NaN where there is none, or none where there is"
        )
        used = np.abs(got - want) / np.maximum(bound, 1e-300)
        assert np.all((np.abs(got - want) <= bound) | np.isnan(want)), (
            f"{np.nanmax(used):.3g} times the bound"
        )
        return float(np.nanmax(used))


def call(kernel: str, arguments: dict[str, Any], **options: Any) -> jax.Array:
    """The kernel, interpreted, of arguments by name."""
    order = ["q", "k_pages", "v_pages", "page_table", "lengths"] + ["first_query", "queries"] * (
        kernel == "prefill"
    )
    rest = {name: x for name, x in arguments.items() if name not in order}
    options = {"blocks": BLOCKS[kernel], "interpret": True} | rest | options
    return KERNELS[kernel](*(arguments[name] for name in order), **options)


@functools.cache
def compiled(
    kernel: str, element: np.dtype, blocks: Any, static: tuple[tuple[str, Any], ...]
) -> Any:
    """The kernel under `jit`: shapes and options that are alike compile once."""
    return jax.jit(
        lambda arguments: call(kernel, arguments, element=element, blocks=blocks, **dict(static))
    )
