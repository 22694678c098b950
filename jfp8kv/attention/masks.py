"""Which keys a query sees."""

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
