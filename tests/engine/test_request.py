"""Which of a prompt's continuations are returned."""

import pytest

from jfp8kv.engine.request import RequestGroup
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.prompts import Encoded


@pytest.mark.parametrize(
    ("held", "want"),
    [({}, [-1.0, -2.0, -0.1, -0.2, -0.3]), ({"regex": "a+"}, [-2.0, -0.1, -0.2, -0.3, -1.0])],
    ids=["free", "held to a grammar"],
)
def test_the_best_of_several_are_whole_before_they_are_likely(held, want) -> None:
    """By its length a text may end that is free, and not one that was to look like something."""
    params = SamplingParams(n=5, best_of=5, **held)
    group = RequestGroup.of(
        Encoded(None, [1]), params, max_new_tokens=9, tokenizer=None, engine_seed=0, number=0
    )
    ends = [
        (-0.1, "dead_end"),
        (-2.0, "stop"),
        (-0.3, "cancelled"),
        (-1.0, "length"),
        (-0.2, "deadline"),
    ]
    for request, (logprob, reason) in zip(group.requests, ends, strict=True):
        request.output_ids, request.output_logprobs, request.finish_reason = (
            [5, 5],
            [logprob] * 2,
            reason,
        )
    assert [out.cumulative_logprob / 2 for out in group.output().outputs] == want
