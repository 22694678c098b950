"""Cases for checking kernels: a kernel, an element type, options and sizes of a random batch."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import testing

ELEMENTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
}
# Arguments of `testing.Batch` by option.
OPTIONS: dict[str, dict[str, Any]] = {
    "channel scales": {"static": (1.0, 1.0)},
    "token and head scales": {"dynamic": True, "spread": 8},
    "window": {"window": 37},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": 1.0},
    "score offset": {"score_offset": 3.0},
}
KERNELS = {"paged_decode": "decode", "paged_decode_mosaic": "decode", "paged_prefill": "prefill"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch.

    Attributes:
      lengths: tokens of each request in the cache.
      queries: query tokens of each request in prefill.
      q_heads: query heads.
      kv_heads: KV heads.
      head_dim: channels per head.
      page_size: tokens per page.
      splits: splits of the keys in decode.
    """

    lengths: tuple[int, ...] = (0, 1, 130, 64, 333)
    queries: tuple[int, ...] = (0, 1, 130, 5, 77)
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    splits: int = 3


@dataclass(frozen=True)
class Case:
    """A kernel, with the options and sizes of a batch."""

    name: str
    kernel: str
    element: str
    sizes: Sizes = field(default_factory=Sizes)
    options: tuple[str, ...] = ()
    q_dtype: Any = ml_dtypes.bfloat16

    def __str__(self) -> str:
        return f"{self.kernel}, {self.element}, {self.name}"

    def batch(self, seed: int) -> "RandomBatch":
        """Return a random batch."""
        return RandomBatch(self, seed)


class RandomBatch:
    """Arguments of a kernel for a case.

    Attributes:
      case: the case.
      dtype: element type of the cache.
      first_row: first row of the batch's layer in the pools.
      arrays: arrays by argument, the fields of `LayerView` among them.
      static: other arguments.
    """

    def __init__(self, case: Case, seed: int):
        sizes = case.sizes
        options: dict[str, Any] = {}
        for name in case.options:
            options |= OPTIONS[name]
        batch = testing.Batch(
            element=np.dtype(ELEMENTS[case.element]),
            q_dtype=case.q_dtype,
            kv_heads=sizes.kv_heads,
            group=sizes.q_heads // sizes.kv_heads,
            head_dim=sizes.head_dim,
            page_size=sizes.page_size,
            lengths=sizes.lengths,
            queries=sizes.queries,
            seed=seed,
            **options,
        )
        arguments = batch.arguments(KERNELS[case.kernel])
        self.case = case
        self.dtype = batch.element
        self.first_row = batch.first_row
        self.static = {name: x for name, x in arguments.items() if name in testing.STATIC}
        self.arrays = {
            name: np.asarray(x, np.int32) if isinstance(x, int) else x
            for name, x in arguments.items()
            if name not in testing.STATIC
        }

    def error(self, got: Any) -> float:
        """Return the largest error as a fraction of the bound of pallas_kernels/error_bound.py."""
        reference = testing.REFERENCES[KERNELS[self.case.kernel]]
        arguments = testing.as_view(self.arrays | self.static)
        return fraction_of_bound(got, *reference(**arguments, element=self.dtype))


def fraction_of_bound(got: Any, want: np.ndarray, bound: np.ndarray) -> float:
    """Return the largest error as a fraction of the bound; NaN is infinitely wrong.

    Padding rows, which have a bound of zero, must be zero.
    """
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    fraction = np.where(error == 0, 0.0, error / np.maximum(bound, np.finfo(np.float64).tiny))
    return float(np.max(np.where(np.isnan(fraction), np.inf, fraction), initial=0.0))
