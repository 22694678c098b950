"""A small soak test: many callers in little memory, and every request has a result."""

from collections import Counter

import pytest

import jfp8kv
from benchmarks import soak

pytestmark = pytest.mark.quick_compile


def test_many_callers_in_little_memory_lose_no_request() -> None:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16}  # few programs to compile
    report = soak.soak(
        jfp8kv.load(soak.MODEL, dtype="float32"), 150, warm_up=50, share=0.04, **sizes
    )
    assert report.complete and report.missing == 0 and sum(report.ends.values()) == 150
    assert report.preemptions > 0 and {"length", "closed", "deadline"} <= set(report.ends)


def new_report(*, free_pages: int = 8, **ends: int) -> soak.Report:
    """Return the report of three requests that ended in these ways."""
    return soak.Report(
        requests=3,
        ends=Counter(ends),
        pages=8,
        free_pages=free_pages,
        preemptions=0,
        warm_bytes=100,
        end_bytes=104,
        seconds=1.0,
    )


def test_a_report_with_missing_or_wrong_requests_or_lost_pages_is_not_complete() -> None:
    assert new_report(length=3).complete
    missing = new_report(length=2)
    assert missing.missing == 1 and not missing.complete
    assert missing.growth == pytest.approx(0.04)
    assert not new_report(length=2, wrong=1).complete
    assert not new_report(length=3, free_pages=7).complete
