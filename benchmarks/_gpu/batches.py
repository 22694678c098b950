"""Small random batches that kernels are checked on: ragged, pages in any order, and NaN wherever nothing may be read."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.paged_decode.reference import paged_decode_reference
from pallas_kernels.paged_prefill.reference import paged_prefill_reference

ELEMENTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
}
BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.float32)}
NAN = {1: 0xFF, 2: 0xFFFF, 4: np.nan}
OUTSIDE = 1 << 20  # a page that no pool has


@dataclass(frozen=True)
class Sizes:
    """Of a batch: tokens in the cache by request, and how many of them are queries of a prefill."""

    lengths: tuple[int, ...] = (0, 1, 130, 64, 333)
    queries: tuple[int, ...] = (0, 1, 130, 5, 77)
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    split: int = 3  # a decode's keys are split among so many programs


@dataclass(frozen=True)
class Case:
    """A kernel on a batch: what is asked of it besides the plain thing stands in `options`."""

    name: str
    kernel: str
    element: str
    sizes: Sizes = field(default_factory=Sizes)
    options: tuple[str, ...] = ()
    q_dtype: Any = ml_dtypes.bfloat16

    def __str__(self) -> str:
        return f"{self.kernel}, {self.element}, {self.name}"

    def batch(self, seed: int) -> "Batch":
        return Batch(self, np.random.default_rng(seed))


class Batch:
    """Random numbers for a case: `arrays` and `static` are the kernel's arguments by name."""

    def __init__(self, case: Case, rng: np.random.Generator):
        s, self.case, self.dtype = case.sizes, case, np.dtype(ELEMENTS[case.element])
        lengths, used = np.int32(s.lengths), [-(-n // s.page_size) for n in s.lengths]
        queries = np.int32(s.queries) if case.kernel == "paged_prefill" else np.minimum(lengths, 1)
        rows = sum(used) + 1
        table = np.full((len(used), max(used) + 1), OUTSIDE, np.int32)
        order = rng.permutation(rows)[: sum(used)]
        for request, (first, count) in enumerate(zip(np.cumsum([0, *used]), used, strict=False)):
            table[request, :count] = order[first : first + count]
        size = (2 * rows, s.kv_heads, s.page_size, s.head_dim)
        live = _live(table, lengths, rows, s.page_size)
        values = [rng.normal(size=size).astype(self.dtype) for _ in "kv"]
        starts, gaps = (
            np.cumsum([2, *queries[:-1] + 1]).astype(np.int32),
            int(queries.sum()) + len(queries) + 2,
        )
        tokens = gaps if case.kernel == "paged_prefill" else len(used)
        self.first_row = rows

        q = rng.normal(size=(tokens, s.q_heads, s.head_dim)).astype(case.q_dtype)
        bits = BITS[self.dtype.itemsize]
        self.arrays: dict[str, np.ndarray] = {
            "q": q,
            "k_pages": _bits(values[0], live, bits),
            "v_pages": _bits(values[1], live, bits),
            "page_table": table,
            "lengths": lengths,
            "first_row": np.int32(rows),
        }
        if case.kernel == "paged_prefill":
            self.arrays |= {"first_query": starts, "queries": queries}
        self.static: dict[str, Any] = {"softcap": 5.0} if "softcap" in case.options else {}
        self.arrays |= self._options(rng, live, tokens)

    def _options(
        self, rng: np.random.Generator, live: np.ndarray, tokens: int
    ) -> dict[str, np.ndarray]:
        s, asked, made = self.case.sizes, self.case.options, {}
        if "channel scales" in asked:
            made |= {
                f"{name}_scale": rng.uniform(0.25, 2, (s.kv_heads, s.head_dim)).astype(np.float32)
                for name in "kv"
            }
        if "token and head scales" in asked:
            for name in "kv":
                exponents = rng.integers(122, 131, (live.shape[0], s.kv_heads, s.page_size))
                made[f"{name}_exponent"] = np.where(live[..., 0], exponents, 255).astype(np.uint8)
        if "window" in asked:
            made["window"] = np.int32(37)
        if "sinks" in asked:
            made["sinks"] = rng.normal(size=s.q_heads).astype(np.float32)
        if "score offset" in asked:
            made["score_offset"] = (3 * rng.normal(size=(tokens, s.q_heads))).astype(np.float32)
        return made

    def error(self, got: Any) -> float:
        """The worst error, as a share of what `pallas_kernels/precision.py` allows: at most 1 if right."""
        reference = (
            paged_prefill_reference
            if self.case.kernel == "paged_prefill"
            else paged_decode_reference
        )
        return share_of_bound(got, *reference(**self.arrays, **self.static, element=self.dtype))


def share_of_bound(got: Any, want: np.ndarray, bound: np.ndarray) -> float:
    """The worst error as a share of what is allowed; NaN is infinitely wrong. Rows of no request must be zero."""
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    share = np.where(error == 0, 0.0, error / np.maximum(bound, np.finfo(np.float64).tiny))
    return float(np.max(np.where(np.isnan(share), np.inf, share), initial=0.0))


def _live(table: np.ndarray, lengths: np.ndarray, rows: int, page_size: int) -> np.ndarray:
    """`[2 * rows, 1, page_size, 1]`: which slots hold a token. The first half belongs to a layer that is not asked for."""
    live = np.zeros((2 * rows, 1, page_size, 1), bool)
    for request, length in enumerate(lengths):
        for token in range(length):
            live[rows + table[request, token // page_size], 0, token % page_size] = True
    return live


def _bits(values: np.ndarray, live: np.ndarray, bits: np.dtype) -> np.ndarray:
    return np.where(live, values.view(bits), bits.type(NAN[bits.itemsize]))
