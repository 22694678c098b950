"""Requests of one prompt, and the selection of the best."""

import pytest

from jfp8kv.request_group import RequestGroup
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.prompts import Encoded


@pytest.mark.parametrize(
    ("constraint", "want"),
    [({}, [-1.0, -2.0, -0.1, -0.2, -0.3]), ({"regex": "a+"}, [-2.0, -0.1, -0.2, -0.3, -1.0])],
    ids=["free text", "structured output"],
)
def test_best_of_ranks_complete_outputs_first_then_by_mean_logprob(constraint, want) -> None:
    """An output that ends by its length is complete, unless it is structured."""
    params = SamplingParams(n=5, best_of=5, **constraint)
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
        request.output_ids = [5, 5]
        request.output_logprobs = [logprob] * 2
        request.finish_reason = reason
    assert [out.cumulative_logprob / 2 for out in group.output().outputs] == want
