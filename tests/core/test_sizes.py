"""Sizes in bytes, as users write them."""

import pytest

from jfp8kv.core.errors import ConfigError
from jfp8kv.core.sizes import parse_bytes


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("2KB", 2000),
        ("2 KiB", 2048),
        ("1.5GiB", 3 * 2**29),
        ("3GB", 3_000_000_000),
        ("7B", 7),
    ],
)
def test_sizes_in_the_usual_spellings(given, bytes_) -> None:
    assert parse_bytes(given) == bytes_


@pytest.mark.parametrize(
    "bad", ["", "two GiB", "-1GB", 0, -5, True, None, float("inf"), float("nan"), "3 XB", "1Gi"]
)
def test_other_sizes_raise_with_an_example(bad) -> None:
    with pytest.raises(ConfigError, match="512MiB"):
        parse_bytes(bad)
