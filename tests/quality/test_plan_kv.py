"""`plan_kv` on tiny models: its measurements match the real cache, and its budgets hold."""

import numpy as np
import pytest

import jfp8kv
from jfp8kv.core.errors import ConfigError
from tests.quality.test_calibrate import load, prompts

pytestmark = pytest.mark.quick_compile

NAME = "qwen2_bias"
LONGEST = 64


def texts() -> list[list[int]]:
    return prompts(NAME, 40, 40, 40, 40)


def measured_on() -> list[list[int]]:
    return texts()[1::2]


def kl(params: jfp8kv.Params, kv_dtype, kv_scales="auto") -> float:
    """Return the KL of the real cache from a float32 cache, nats per token, in float64 NumPy."""

    def log_softmax(x):
        x = x.astype(np.float64)
        return (
            x
            - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - x.max(-1, keepdims=True)
        )

    total = 0.0
    for ids in measured_on():
        p = log_softmax(jfp8kv.logits(params, ids, kv_dtype="float32"))
        q = log_softmax(jfp8kv.logits(params, ids, kv_dtype=kv_dtype, kv_scales=kv_scales))
        total += (np.exp(p) * (p - q)).sum()
    return total / sum(map(len, measured_on()))


def plan(**given) -> jfp8kv.KVPlan:
    return jfp8kv.plan_kv(load(NAME), texts(), max_model_len=LONGEST, progress=False, **given)


@pytest.fixture(scope="module")
def half() -> jfp8kv.KVPlan:
    return plan(budget="80%")


def test_the_loss_matches_the_real_cache(half) -> None:
    """Simulated and stored values differ only by rounding, which sometimes changes a code: 1%."""
    assert half.loss == pytest.approx(kl(load(NAME), half), rel=0.01)


def test_the_bytes_match_an_engine_and_the_budget(half) -> None:
    params = load(NAME)
    llm = jfp8kv.LLM(params, kv_dtype=half, max_model_len=LONGEST, kv_cache_memory="2MB")
    assert llm.stats.kv_bytes_per_token == half.bytes_per_token
    c = params.config
    assert half.bytes_per_token <= 0.8 * c.layers * 2 * c.kv_heads * c.head_dim * 2


def test_no_uniform_cache_has_a_smaller_loss(half) -> None:
    """Losses of layers add up to first order; interactions are a few percent here."""
    params = load(NAME)
    less = jfp8kv.calibrate(
        params, texts()[::2], granularity="channel", k_offset=True, max_model_len=LONGEST
    )
    assert half.loss <= 1.05 * min(
        kl(params, "fp8_e4m3", scales) for scales in ("unit", "token_head", less)
    )


def test_max_loss_gives_the_fewest_bytes_within_it(half) -> None:
    found = plan(max_loss=half.loss * 1.5)
    assert found.loss <= half.loss * 1.5 and found.bytes_per_token <= half.bytes_per_token


def test_the_plan_generates_and_round_trips_through_a_file(half, tmp_path) -> None:
    half.save(tmp_path / "plan")
    given = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    one, other = (
        jfp8kv.generate(load(NAME), [[5, 6, 7]], kv_dtype=each, **given)[0].token_ids
        for each in (half, tmp_path / "plan")
    )
    assert one == other
    assert f"{half.bytes_per_token:,.0f} bytes/token" in str(half) and "layers" in repr(half)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either budget"),
        ({"budget": 100, "max_loss": 0.1}, "either budget"),
        ({"budget": "ten"}, "budget='ten'"),
        ({"budget": True}, "budget=True"),
        ({"budget": 1}, "takes at least .* give that budget"),
        ({"max_loss": -1}, "must be a number above 0; nats per token"),
        ({"max_loss": 1e-12}, "the smallest measured loss"),
        ({"budget": 100, "kv_dtypes": "fp8"}, "must be a list of formats"),
        ({"budget": 100, "kv_dtypes": ["fp9"]}, "fp9"),
        ({"budgets": 100}, "Did you mean 'budget'"),
    ],
)
def test_invalid_arguments_are_refused(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**given)
