"""Uses of the public interface that mypy checks and nothing runs.

Each `type: ignore` marks a mistake that a type checker must flag. mypy reports an unused one, so
`make lint` fails when a keyword is no longer checked.
"""

from typing import assert_type

import numpy as np

import jfp8kv
from jfp8kv import LLM, RequestOutput, SamplingParams


def keywords() -> None:
    """Misspelt keywords and values of a wrong type are flagged, and correct ones are not."""
    SamplingParams(max_tokens=3, stop="end", logit_bias={5: -1.0})
    SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    LLM("model", kv_dtype="fp8", kv_cache_memory="2GiB", dtype="bfloat16")
    LLM("model", kv_cache_dtype={"default": "fp8", "skip": [0]})
    LLM("model", page_sise=64)  # type: ignore[call-arg]
    LLM("model", page_size="64")  # type: ignore[arg-type]
    LLM("model", attention="flash")  # type: ignore[arg-type]
    jfp8kv.generate("model", [[1, 2]], max_tokens=3, kv_scales="unit")
    jfp8kv.generate("model", "a", temprature=0.5)  # type: ignore[call-arg]
    jfp8kv.calibrate("model", ["a"], granularity="channel", headroom=2.0)
    jfp8kv.calibrate("model", ["a"], granularty="head")  # type: ignore[call-arg]
    jfp8kv.calibrate("model", ["a"], observer="max")  # type: ignore[arg-type]
    jfp8kv.compare("model", ["a"], kv_dtypes=["fp8"], needle_lengths=[256])
    jfp8kv.compare("model", ["a"], windw=512)  # type: ignore[call-arg]
    jfp8kv.plan_kv("model", ["a"], budget="60%")
    jfp8kv.plan_kv("model", ["a"], budgt="60%")  # type: ignore[call-arg]
    jfp8kv.bench("model", kv_dtypes=["fp8"], requests=4)
    jfp8kv.bench("model", request=4)  # type: ignore[call-arg]
    LLM("model").generate("a", temprature=0.5)  # type: ignore[call-arg]
    LLM("model").stream("a", temprature=0.5)  # type: ignore[call-arg]
    LLM("model").chat([{"role": "user", "content": "a"}], progres=True)  # type: ignore[call-arg]


def results() -> None:
    """Return types are precise."""
    assert_type(jfp8kv.generate("model", "a"), list[RequestOutput])
    assert_type(LLM("model").stats, jfp8kv.Stats)
    assert_type(jfp8kv.score("model", "a"), np.ndarray)
    assert_type(jfp8kv.score("model", [1, 2]), np.ndarray)
    assert_type(jfp8kv.score("model", ["a", "b"]), list[np.ndarray])
    assert_type(LLM("model").score([[1, 2], [3]]), list[np.ndarray])
