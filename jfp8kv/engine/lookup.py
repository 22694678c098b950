"""Prompt lookup: what a text may go on with, read off the text itself.

Texts repeat themselves and their prompts: names, code, quotations, answers that copy. Where the last few tokens stood before,
what came after them then is a guess at what comes now (a *draft*), and takes no second model (Saxena 2023, "Prompt lookup
decoding"). `engine/speculative.py` verifies it: a wrong guess costs time alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST = 3  # tokens compared: longer occurrences are followed no more faithfully (docs/log.md)


def draft(
    text: Int[Array, " text"], known: Int[Array, ""], *, count: int
) -> tuple[Int[Array, " count"], Int[Array, ""]]:
    """`count` tokens that may follow the first `known` of `text` (one at least), and how many tokens speak for them.

    They followed the longest earlier occurrence of the text's last tokens, of up to `LONGEST` of them, the latest of several.
    Its length is what speaks for them: with 0 they mean nothing. An occurrence so late that it overlaps the text's end is a
    repetition, and goes on as such.
    """
    size = text.shape[0]
    place, last = jnp.arange(size, dtype=jnp.int32), known - 1
    alike, length = place < last, jnp.zeros(size, jnp.int32)
    for back in range(LONGEST):
        before = jnp.pad(text, (back, 0))[:size]  # the token so far before each place
        alike &= (place >= back) & (before == text[last - back])
        length += alike.astype(jnp.int32)
    best = jnp.max(jnp.where(length > 0, length * size + place, 0))  # the longest, then the latest
    end = best % size
    period = jnp.maximum(last - end, 1)
    return text[end + 1 + jnp.arange(count, dtype=jnp.int32) % period], best // size
