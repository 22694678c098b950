"""Drafts of prompt lookup, against a search that can be checked by eye."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given

from jfp8kv.engine.speculative import draft

MAX_LENGTH, COUNT = 24, 5
compiled = jax.jit(functools.partial(draft, count=COUNT))


def compute_draft(sequence: list[int], padding: int = 1) -> tuple[list[int], int]:
    """Return the draft for a sequence in a longer array, padded with `padding`."""
    padded = np.full(MAX_LENGTH, padding, np.int32)
    padded[: len(sequence)] = sequence
    tokens, matched = compiled(jnp.asarray(padded), jnp.int32(len(sequence)))
    return tokens.tolist(), int(matched)


def search(sequence: list[int]) -> tuple[list[int], int]:
    """Search for the longest suffix, latest occurrence first, and repeat the tokens after it."""
    for length in (3, 2, 1):
        suffix = sequence[len(sequence) - length :]
        for start in range(len(sequence) - length - 1, -1, -1):
            if sequence[start : start + length] == suffix and len(suffix) == length:
                after = sequence[start + length :]
                return (after * COUNT)[:COUNT], length
    return [], 0


@given(
    sequence=st.lists(st.integers(0, 3), min_size=1, max_size=MAX_LENGTH), padding=st.integers(0, 3)
)
@example(sequence=[2], padding=2)
@example(sequence=[2, 2], padding=2)
@example(sequence=[0, 1] * 12, padding=0)
def test_a_draft_follows_the_longest_and_latest_occurrence(sequence, padding) -> None:
    tokens, matched = compute_draft(sequence, padding)
    expected, length = search(sequence)
    assert matched == length and (not length or tokens == expected)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([1, 2, 3, 9, 8, 7, 6, 5, 1, 2, 3], ([9, 8, 7, 6, 5], 3)),
        ([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3], ([5, 0, 1, 2, 3], 3)),  # the latest of several
        (
            [7, 2, 3, 4, 0, 9, 3, 5, 0, 8, 2, 3],
            ([4, 0, 9, 3, 5], 2),
        ),  # two matching tokens before one
        ([5, 5, 5, 5], ([5, 5, 5, 5, 5], 3)),  # an occurrence that overlaps the end
        ([9, 1, 2, 1, 2, 1, 2], ([1, 2, 1, 2, 1], 3)),
        ([9, 4, 9], ([4, 9, 4, 9, 4], 1)),  # followed by fewer tokens than a draft has
    ],
)
def test_examples(sequence, expected) -> None:
    assert compute_draft(sequence) == expected


@pytest.mark.parametrize("sequence", [[5], [1, 2, 3, 4]])
def test_a_single_token_or_a_sequence_without_repetition_has_no_draft(sequence) -> None:
    assert compute_draft(sequence, padding=sequence[-1])[1] == 0
