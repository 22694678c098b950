"""The frontier is what trying every combination finds."""

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from jfp8kv.quality.pareto import pareto_front


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_every_point_is_the_least_loss_for_its_bytes_and_none_is_missing(
    layers, ways, seed
) -> None:
    rng = np.random.default_rng(seed)
    costs, losses = (
        rng.integers(1, 6, (layers, ways)),
        rng.integers(0, 50, (layers, ways)) / 8,
    )  # sums of eighths are exact
    every = [
        (
            sum(costs[layer, w] for layer, w in enumerate(choice)),
            sum(losses[layer, w] for layer, w in enumerate(choice)),
        )
        for choice in itertools.product(range(ways), repeat=layers)
    ]
    unbeaten = sorted(
        {p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every)}
    )
    found = pareto_front(costs.tolist(), losses)
    assert [(point.bytes, point.loss) for point in found] == unbeaten
    for point in found:
        assert point.bytes == sum(costs[layer, w] for layer, w in enumerate(point.ways))
        assert point.loss == sum(losses[layer, w] for layer, w in enumerate(point.ways))
