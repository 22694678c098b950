"""A needle's prompt is of the length asked for, with the needle at its depth and once more at the end."""

import itertools

import numpy as np
import pytest

from jfp8kv import ConfigError
from jfp8kv.quality.needle import (
    CUE_TOKENS,
    DEPTHS,
    NEEDLE_TOKENS,
    SHORTEST,
    depths_for,
    lengths_for,
    needles,
)

TEXT = np.random.default_rng(0).integers(100, 400, 700).astype(np.int32)


@pytest.mark.parametrize(("length", "depth"), [*itertools.product([SHORTEST, 128, 1024], DEPTHS)])
def test_the_needle_stands_at_its_depth_and_is_said_again_at_the_end(length, depth):
    (made,) = needles(TEXT, (length,), (depth,))
    needle, hay = made.ids[-NEEDLE_TOKENS:], length - 2 * NEEDLE_TOKENS
    assert len(made.ids) == length
    assert made.ids[made.place : made.place + NEEDLE_TOKENS] == needle
    assert made.place == 1 + round(depth * (hay - 1))
    rest = made.ids[: made.place] + made.ids[made.place + NEEDLE_TOKENS : -NEEDLE_TOKENS]
    assert rest == np.resize(TEXT, hay).tolist(), "the text itself, repeated where it is too short"
    assert made.first == length - NEEDLE_TOKENS + CUE_TOKENS


def test_needles_are_of_the_texts_own_tokens_all_different_and_always_the_same():
    made = needles(TEXT, (128, 256), DEPTHS)
    assert [(n.length, n.depth) for n in made] == list(itertools.product((128, 256), DEPTHS))
    drawn = [tuple(n.ids[-NEEDLE_TOKENS:]) for n in made]
    assert all(
        set(needle) <= set(TEXT.tolist()) and len(set(needle)) == NEEDLE_TOKENS for needle in drawn
    )
    assert len(set(drawn)) == len(made)
    assert needles(TEXT, (128, 256), DEPTHS) == made


def test_a_text_of_few_different_tokens_repeats_them():
    (made,) = needles(np.array([5, 6], np.int32), (SHORTEST,), (0.5,))
    assert set(made.ids) <= {5, 6} and len(made.ids) == SHORTEST


def test_the_usual_lengths_are_as_long_as_the_model_takes():
    assert lengths_for(None, 4096) == (256, 1024)
    assert lengths_for(None, 512) == (256, 512)
    assert lengths_for(None, 200) == (200,)
    assert lengths_for(None, SHORTEST - 1) == ()
    assert lengths_for([], 4096) == ()


@pytest.mark.parametrize("lengths", [[SHORTEST - 1], [300], [True], ["128"], 128, "128"])
def test_a_length_that_cannot_be_is_refused(lengths):
    with pytest.raises(ConfigError, match="needle_lengths="):
        lengths_for(lengths, 256)


@pytest.mark.parametrize("depths", [[-0.1], [1.1], [float("nan")], ["0"], 0.5, "half"])
def test_a_depth_that_cannot_be_is_refused(depths):
    with pytest.raises(ConfigError, match="needle_depths="):
        depths_for(depths)
