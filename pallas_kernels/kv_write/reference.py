"""What `kv_write` leaves in the pools, in NumPy: one token and one head after another."""

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
    """Copies of the pools with the new tokens in them, in the order of `Written`."""
    given = (
        ("k", k, k_pages, k_exponent, k_inverse, k_offset),
        ("v", v, v_pages, v_exponent, v_inverse, None),
    )
    done: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for name, new, pages, exponents, inverse, offset in given:
        pages, exponents = np.array(pages), None if exponents is None else np.array(exponents)
        for request, token, head in np.ndindex(new.shape[:3]):
            position = start[request] + token
            if position >= lengths[request]:
                continue
            number, slot = (
                page_table[request, position // pages.shape[2]],
                position % pages.shape[2],
            )
            x = new[request, token, head].astype(np.float32)
            if offset is not None:
                x = x - offset[head]
            if exponents is not None:
                exponent = smallest_exponent(x, element)
                first = first_row if first_exponent_row is None else first_exponent_row
                exponents[first + number, head, slot] = exponent
                x = x * np.float32(2.0 ** (127 - exponent))
            elif inverse is not None:
                x = x * inverse[head]
            pages[first_row + number, head, slot] = stored(x, element).view(pages.dtype)
        done[name] = pages, exponents
    return done["k"][0], done["v"][0], done["k"][1], done["v"][1]


def stored(x: np.ndarray, element: Any) -> np.ndarray:
    """Float32 numbers as values of `element`, saturated; a float32 stays what it is."""
    largest = np.inf if np.dtype(element) == np.float32 else float(ml_dtypes.finfo(element).max)
    return np.clip(x, -largest, largest).astype(element)


def smallest_exponent(x: np.ndarray, element: Any) -> int:
    """The smallest `e` of at least 1 with all finite numbers within `2 ** (e - 127)` times the largest of `element`."""
    most = max((abs(float(number)) for number in x if np.isfinite(number)), default=0.0)
    exponent = 1
    while most > float(ml_dtypes.finfo(element).max) * 2.0 ** (exponent - 127):
        exponent += 1
    return exponent
