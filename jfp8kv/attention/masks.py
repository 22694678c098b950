"""Which keys a query sees."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def visible(
    query: Int[Array, " tokens"],
    key: Int[Array, " keys"],
    *,
    length: Int[Array, ""],
    window: Int[Array, ""] | None = None,
) -> Bool[Array, "tokens keys"]:
    """Causal: keys at or before the query's position and in the cache (`< length`), and inside `window` if there is one.

    A window of `w` covers the query itself and the `w - 1` tokens before it; 0 means no window.
    """
    q, k = query[:, None], key[None, :]
    seen = (k <= q) & (k < length)
    if window is not None:
        seen &= (q - k < window) | (window == 0)
    return seen


def first_visible(start: Int[Array, ""], window: Int[Array, ""] | None) -> Int[Array, ""]:
    """The first position that a query at `start` sees, and so the first that any query from there on does."""
    if window is None:
        return jnp.zeros_like(start)
    return jnp.where(window == 0, 0, jnp.maximum(start - window + 1, 0))


def live(
    key: Int[Array, " keys"], *, first: Int[Array, ""], length: Int[Array, ""]
) -> Bool[Array, " keys"]:
    """Positions that hold what some query sees. Others may hold anything, NaN codes too: they are cleared, not just masked."""
    return (key >= first) & (key < length)
