"""What prompt lookup drafts, against a search that can be checked by eye."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given

from jfp8kv.engine.lookup import draft

ROOM, COUNT = 24, 5
compiled = jax.jit(functools.partial(draft, count=COUNT))


def found(text: list[int], after: int = 1) -> tuple[list[int], int]:
    """The draft for a text in a longer array, whose rest holds `after`."""
    padded = np.full(ROOM, after, np.int32)
    padded[: len(text)] = text
    tokens, length = compiled(jnp.asarray(padded), jnp.int32(len(text)))
    return tokens.tolist(), int(length)


def searched(text: list[int]) -> tuple[list[int], int]:
    """Longest ends first, of each the latest place that is not the end itself; then what came after, again and again."""
    for length in (3, 2, 1):
        end = text[len(text) - length :]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == end and len(end) == length:
                after = text[start + length :]
                return (after * COUNT)[:COUNT], length
    return [], 0


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=ROOM), after=st.integers(0, 3))
@example(text=[2], after=2)
@example(text=[2, 2], after=2)
@example(text=[0, 1] * 12, after=0)
def test_a_draft_is_what_followed_the_longest_and_latest_occurrence(text, after) -> None:
    tokens, length = found(text, after)
    want, wanted = searched(text)
    assert length == wanted and (not wanted or tokens == want)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ([1, 2, 3, 9, 8, 7, 6, 5, 1, 2, 3], ([9, 8, 7, 6, 5], 3)),
        ([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3], ([5, 0, 1, 2, 3], 3)),  # the latest of several
        ([7, 2, 3, 4, 0, 9, 3, 5, 0, 8, 2, 3], ([4, 0, 9, 3, 5], 2)),  # two tokens alike before one
        ([5, 5, 5, 5], ([5, 5, 5, 5, 5], 3)),  # an occurrence that overlaps the end
        ([9, 1, 2, 1, 2, 1, 2], ([1, 2, 1, 2, 1], 3)),
        ([9, 4, 9], ([4, 9, 4, 9, 4], 1)),  # followed by less than a draft's length
    ],
)
def test_examples(text, want) -> None:
    assert found(text) == want


@pytest.mark.parametrize("text", [[5], [1, 2, 3, 4]])
def test_a_text_of_one_token_or_without_repetition_has_none(text) -> None:
    assert found(text, after=text[-1])[1] == 0
