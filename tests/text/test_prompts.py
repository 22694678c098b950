"""Prompts in every accepted form, and pairs of a prompt and a completion."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jfp8kv.core.errors import ConfigError
from jfp8kv.text.prompts import EncodedPair, as_list, encode, encode_pair, is_single
from jfp8kv.text.tokenizer import as_tokenizer

CHAT = [{"role": "user", "content": "a"}]


@pytest.fixture
def tokenizer():
    """A tokenizer that merges `b` and `c` into one token."""
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3}
    backend = Tokenizer(models.BPE(vocab, [("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return as_tokenizer(backend)


@pytest.mark.parametrize("prompt", ["a", [1, 2], np.array([1, 2]), CHAT], ids=str)
def test_a_single_prompt_of_any_form_becomes_a_list_of_one(prompt):
    assert is_single(prompt) and len(as_list(prompt)) == 1


@pytest.mark.parametrize("prompts", [["a", "b"], [[1], [2, 3]], [CHAT, CHAT], ["a", [1]], []])
def test_a_list_of_prompts_stays_a_list(prompts):
    assert not is_single(prompts) and as_list(prompts) == prompts


def test_a_prompt_of_an_unknown_form_raises_with_the_accepted_forms(tokenizer):
    for prompt in (5, None, b"a", [True], [1.5]):
        with pytest.raises(ConfigError, match="a str, a list of str, a list of token id lists"):
            encode(prompt, tokenizer, what="prompt 0")
    with pytest.raises(ConfigError, match="prompt 0 is text, and this model has no tokenizer"):
        encode("a", None, what="prompt 0")
    with pytest.raises(ConfigError, match="prompt 0 is not valid Unicode at character 1"):
        encode("a\ud800", tokenizer, what="prompt 0")


def test_a_token_that_spans_prompt_and_completion_belongs_to_the_completion(tokenizer):
    assert encode_pair("ab", "c", tokenizer) == EncodedPair([0, 3], 1)
    assert encode_pair("a", "b", tokenizer) == EncodedPair([0, 1], 1)
    assert encode_pair([0, 1], "c", tokenizer) == EncodedPair([0, 1, 2], 2)
    assert encode_pair("abc", None, tokenizer) == EncodedPair([0, 3], 0)
    assert encode_pair([0, 1], None, None) == EncodedPair([0, 1], 0)
    with pytest.raises(
        ConfigError, match="the completion is text, and this model has no tokenizer"
    ):
        encode_pair([0, 1], "c", None)
