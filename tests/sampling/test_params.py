import math

import numpy as np
import pytest

from jfp8kv.core.errors import ConfigError
from jfp8kv.sampling.params import SamplingParams


def test_the_defaults_are_those_of_the_contract():
    assert vars(SamplingParams()) == {
        "max_tokens": 128,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "n": 1,
        "logprobs": None,
        "prompt_logprobs": None,
        "seed": None,
        "logit_bias": None,
        "min_tokens": 0,
        "best_of": None,
        "deadline_s": None,
        "json_schema": None,
        "regex": None,
        "choice": None,
        "grammar": None,
    }


INVALID = [
    ("max_tokens", [0, -1, 2.0, "8", True, None]),
    ("temperature", [-0.1, 1001, 1e39, math.nan, math.inf, "0.7", True, None]),
    ("top_k", [-2, 1.0, "5", True]),
    ("top_p", [0, -0.5, 1.0001, math.nan, "0.9", True]),
    ("min_p", [-0.1, 1.1, math.nan, "0"]),
    ("repetition_penalty", [0, -1, 1e-4, 1001, math.inf, math.nan, "1"]),
    ("presence_penalty", [-2.1, 2.1, math.nan, "1"]),
    ("frequency_penalty", [-2.1, 2.1, math.nan, "1"]),
    ("stop", ["", ["a", ""], [1], 1, b"stop", {"a": 1}]),
    ("stop_token_ids", ["2", [-1], [1.0], [True], True, {1: 2}, 2.5, [2**31]]),
    ("ignore_eos", [1, "yes", None]),
    ("include_stop_str_in_output", [0, "yes", None]),
    ("skip_special_tokens", [0, "yes", None]),
    ("spaces_between_special_tokens", [1, "no", None]),
    ("n", [0, -1, 1.5, True]),
    ("best_of", [0, -1, 1.5, True]),
    ("deadline_s", [0, -1.0, math.inf, math.nan, "1", True]),
    ("logprobs", [-1, 21, 1.0, True]),
    ("prompt_logprobs", [-1, 21, 1.0, True]),
    ("seed", [-1, 2**64, 1.0, "1", True]),
    (
        "logit_bias",
        [
            [1, 2],
            {"5": 1.0},
            {-1: 1.0},
            {5: math.nan},
            {5: math.inf},
            {5: 1e39},
            {5: -1e39},
            {5: "1"},
            {5: True},
        ],
    ),
    ("min_tokens", [-1, 1.0, True, 129]),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in INVALID for value in values]
)
def test_a_value_of_the_wrong_range_or_type_raises_with_its_name(name, value):
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


def test_an_error_names_the_value_the_range_and_what_to_try():
    with pytest.raises(
        ConfigError,
        match=r"temperature=-1: must be a number of at least 0 and .*; try 0 for greedy",
    ):
        SamplingParams(temperature=-1)
    with pytest.raises(
        ConfigError, match=r"top_p=1.5: must be a number above 0 and at most 1; .*try 0.9"
    ):
        SamplingParams(top_p=1.5)
    with pytest.raises(
        ConfigError, match=r"min_tokens=9: must not exceed max_tokens=8; try max_tokens=9 or more"
    ):
        SamplingParams(max_tokens=8, min_tokens=9)
    with pytest.raises(ConfigError, match=r"best_of=2: must be at least n=3, .*; try best_of=3"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(
        ConfigError, match=r"deadline_s=0: must be a number above 0; None sets no deadline"
    ):
        SamplingParams(deadline_s=0)


def test_values_at_the_bounds_of_their_ranges_are_accepted():
    SamplingParams(
        temperature=0, top_k=-1, top_p=1, min_p=1, n=1, max_tokens=1, min_tokens=1, logprobs=0
    )
    SamplingParams(n=2, best_of=2, deadline_s=1e-9)
    SamplingParams(
        presence_penalty=-2, frequency_penalty=2, prompt_logprobs=20, seed=2**64 - 1, min_p=0
    )


def test_stop_and_stop_token_ids_become_tuples():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)
    assert SamplingParams(stop_token_ids=np.array([1, 2])).stop_token_ids == (1, 2)


def test_numpy_numbers_become_plain_ones():
    params = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.uint32(3))
    assert [type(x) for x in (params.max_tokens, params.temperature, params.seed)] == [
        int,
        float,
        int,
    ]


def test_parameters_are_frozen_and_hash_by_value():
    params = SamplingParams(stop=["a"], logit_bias={1: 2})
    assert params == SamplingParams(stop="a", logit_bias={1: 2.0})
    assert hash(params) == hash(SamplingParams(stop="a", logit_bias={1: 2.0}))
    with pytest.raises(AttributeError):
        params.top_p = 0.5


def test_changing_the_callers_logit_bias_does_not_change_the_request():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 9.0
    assert params.logit_bias == {1: 2.0}


def test_fields_replace_those_of_the_base_and_keep_the_rest():
    base = SamplingParams(temperature=0.5, top_k=3)
    assert SamplingParams.from_fields(base, top_k=9) == SamplingParams(temperature=0.5, top_k=9)
    assert SamplingParams.from_fields(top_p=0.5) == SamplingParams(top_p=0.5)
    assert SamplingParams.from_fields(base) == base


def test_an_unknown_field_names_the_nearest_known_one():
    with pytest.raises(
        ConfigError, match="temprature: no such keyword. Did you mean 'temperature'"
    ):
        SamplingParams.from_fields(temprature=0.5)
    with pytest.raises(ConfigError, match="must be a SamplingParams"):
        SamplingParams.from_fields({"temperature": 1.0})


def test_token_ids_outside_the_vocabulary_raise():
    for params in (SamplingParams(stop_token_ids=[3, 100]), SamplingParams(logit_bias={100: 1.0})):
        params.check_vocab(101)
        with pytest.raises(
            ConfigError, match="id 100 is outside the vocabulary; ids go from 0 to 99"
        ):
            params.check_vocab(100)


def test_only_penalties_need_counts():
    assert not SamplingParams(logit_bias={1: 1.0}, top_k=3, min_tokens=2).counts_tokens
    assert SamplingParams(repetition_penalty=1.1).counts_tokens
    assert SamplingParams(presence_penalty=0.1).counts_tokens
    assert SamplingParams(frequency_penalty=-0.1).counts_tokens
