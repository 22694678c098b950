"""The Pareto front is the one that trying every combination finds."""

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from jfp8kv.quality.pareto import pareto_front


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_the_front_has_every_unbeaten_combination_and_no_other(layers, options, seed) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, (layers, options))
    losses = rng.integers(0, 50, (layers, options)) / 8  # sums of eighths are exact

    def total(values: np.ndarray, choice: tuple[int, ...]) -> float:
        return sum(values[layer, option] for layer, option in enumerate(choice))

    every = [
        (total(sizes, choice), total(losses, choice))
        for choice in itertools.product(range(options), repeat=layers)
    ]
    unbeaten = sorted(
        {p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every)}
    )
    front = pareto_front(sizes.tolist(), losses)
    assert [(point.bytes, point.loss) for point in front] == unbeaten
    for point in front:
        assert point.bytes == total(sizes, point.options)
        assert point.loss == total(losses, point.options)
