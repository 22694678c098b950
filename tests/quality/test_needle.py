"""A needle's prompt has the given length, with the needle at its depth and again at the end."""

import itertools

import numpy as np
import pytest

from jfp8kv import ConfigError
from jfp8kv.quality.needle import (
    CUE_TOKENS,
    DEPTHS,
    MIN_LENGTH,
    NEEDLE_TOKENS,
    allowed_lengths,
    create_needles,
)
from jfp8kv.quality.options import CompareOptions

TEXT = np.random.default_rng(0).integers(100, 400, 700).astype(np.int32)


@pytest.mark.parametrize(("length", "depth"), [*itertools.product([MIN_LENGTH, 128, 1024], DEPTHS)])
def test_the_needle_is_at_its_depth_and_repeated_at_the_end(length, depth):
    (prompt,) = create_needles(TEXT, (length,), (depth,))
    needle = prompt.ids[-NEEDLE_TOKENS:]
    hay = length - 2 * NEEDLE_TOKENS
    start, end = prompt.position, prompt.position + NEEDLE_TOKENS
    assert len(prompt.ids) == length
    assert prompt.ids[start:end] == needle
    assert start == 1 + round(depth * (hay - 1))
    rest = prompt.ids[:start] + prompt.ids[end:-NEEDLE_TOKENS]
    assert rest == np.resize(TEXT, hay).tolist(), "the text, repeated where it is too short"
    assert prompt.first == length - NEEDLE_TOKENS + CUE_TOKENS


def test_needles_are_distinct_tokens_of_the_text_and_deterministic():
    prompts = create_needles(TEXT, (128, 256), DEPTHS)
    assert [(n.length, n.depth) for n in prompts] == list(itertools.product((128, 256), DEPTHS))
    needles = [tuple(n.ids[-NEEDLE_TOKENS:]) for n in prompts]
    for needle in needles:
        assert set(needle) <= set(TEXT.tolist()) and len(set(needle)) == NEEDLE_TOKENS
    assert len(set(needles)) == len(prompts)
    assert create_needles(TEXT, (128, 256), DEPTHS) == prompts


def test_a_text_with_few_distinct_tokens_repeats_them():
    (prompt,) = create_needles(np.array([5, 6], np.int32), (MIN_LENGTH,), (0.5,))
    assert set(prompt.ids) <= {5, 6} and len(prompt.ids) == MIN_LENGTH


def test_default_lengths_are_limited_by_the_model():
    assert allowed_lengths(None, 4096) == (256, 1024)
    assert allowed_lengths(None, 512) == (256, 512)
    assert allowed_lengths(None, 200) == (200,)
    assert allowed_lengths(None, MIN_LENGTH - 1) == ()
    assert allowed_lengths([], 4096) == ()


@pytest.mark.parametrize("lengths", [[MIN_LENGTH - 1], [300], [True], ["128"], 128, "128"])
def test_an_invalid_length_is_refused(lengths):
    with pytest.raises(ConfigError, match="needle_lengths="):
        allowed_lengths(CompareOptions(needle_lengths=lengths).needle_lengths, 256)


@pytest.mark.parametrize("depths", [[-0.1], [1.1], [float("nan")], ["0"], 0.5, "half"])
def test_an_invalid_depth_is_refused(depths):
    with pytest.raises(ConfigError, match="needle_depths="):
        CompareOptions(needle_depths=depths)
