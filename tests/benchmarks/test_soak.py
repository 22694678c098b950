"""A small soak: many callers in little memory, and every request accounted for."""

from collections import Counter

import pytest

import jfp8kv
from benchmarks import soak

pytestmark = pytest.mark.quick_compile


def test_nothing_is_lost_by_many_callers_in_little_memory() -> None:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16}  # few programs to compile
    report = soak.soak(
        jfp8kv.load(soak.MODEL, dtype="float32"), 150, settled=50, share=0.04, **sizes
    )
    assert report.whole and report.missing == 0 and sum(report.ends.values()) == 150
    assert report.preemptions > 0 and {"length", "closed", "deadline"} <= set(report.ends)


def test_a_request_that_nobody_hears_of_is_missed() -> None:
    report = soak.Report(3, Counter(length=2), 8, 8, 0, 100, 104, 1.0)
    assert report.missing == 1 and not report.whole and report.growth == pytest.approx(0.04)
    assert not soak.Report(3, Counter(length=2, wrong=1), 8, 8, 0, 100, 104, 1.0).whole
    assert not soak.Report(3, Counter(length=3), 8, 7, 0, 100, 104, 1.0).whole
