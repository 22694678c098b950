"""Reference of `kv_write` in NumPy: a loop over tokens and heads."""

from typing import Any

import ml_dtypes
import numpy as np


def kv_write_reference(
    k: np.ndarray,
    v: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    page_table: np.ndarray,
    start: np.ndarray,
    lengths: np.ndarray,
    *,
    element: Any,
    first_row: int | np.integer = 0,
    k_inverse: np.ndarray | None = None,
    v_inverse: np.ndarray | None = None,
    k_offset: np.ndarray | None = None,
    k_exponent: np.ndarray | None = None,
    v_exponent: np.ndarray | None = None,
    first_exponent_row: int | np.integer | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return copies of the pools with the new tokens, in the order of `UpdatedPools`."""
    if first_exponent_row is None:
        first_exponent_row = first_row

    def write(
        new: np.ndarray,
        pages: np.ndarray,
        exponents: np.ndarray | None,
        inverse: np.ndarray | None,
        offset: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        pages = np.array(pages)
        exponents = None if exponents is None else np.array(exponents)
        page_size = pages.shape[2]
        for request, token, head in np.ndindex(new.shape[:3]):
            position = start[request] + token
            if position >= lengths[request]:
                continue
            page = page_table[request, position // page_size]
            slot = position % page_size
            x = new[request, token, head].astype(np.float32)
            if offset is not None:
                x = x - offset[head]
            if exponents is not None:
                exponent = smallest_exponent(x, element)
                exponents[first_exponent_row + page, head, slot] = exponent
                x = x * np.float32(2.0 ** (127 - exponent))
            elif inverse is not None:
                x = x * inverse[head]
            pages[first_row + page, head, slot] = quantize(x, element).view(pages.dtype)
        return pages, exponents

    new_k_pages, new_k_exponent = write(k, k_pages, k_exponent, k_inverse, k_offset)
    new_v_pages, new_v_exponent = write(v, v_pages, v_exponent, v_inverse, None)
    return new_k_pages, new_v_pages, new_k_exponent, new_v_exponent


def quantize(x: np.ndarray, element: Any) -> np.ndarray:
    """Return float32 numbers as saturated values of `element`; float32 is unchanged."""
    largest = np.inf if np.dtype(element) == np.float32 else float(ml_dtypes.finfo(element).max)
    return np.clip(x, -largest, largest).astype(element)


def smallest_exponent(x: np.ndarray, element: Any) -> int:
    """Return the smallest `e >= 1` with all finite numbers within `2 ** (e - 127) * largest`."""
    amax = max((abs(float(number)) for number in x if np.isfinite(number)), default=0.0)
    exponent = 1
    while amax > float(ml_dtypes.finfo(element).max) * 2.0 ** (exponent - 127):
        exponent += 1
    return exponent
