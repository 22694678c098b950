"""Static scales are validated and saved; dynamic ones are the smallest fitting power of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.cache.scales import (
    KVScales,
    check_shape,
    exponent_inverse,
    exponent_scale,
    token_head_exponent,
)
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.core.formats import E4M3, E5M2


@pytest.mark.parametrize(
    ("shape", "granularity"), [((2, 1, 1), "tensor"), ((2, 3, 1), "head"), ((2, 3, 4), "channel")]
)
def test_scales_survive_a_file_with_their_granularity(tmp_path, shape, granularity) -> None:
    scales = KVScales(np.random.default_rng(0).uniform(0.1, 2, shape), np.ones((2, 1, 1)))
    scales.save(tmp_path / "scales.safetensors")
    again = KVScales.load(tmp_path / "scales.safetensors")
    assert again.granularity == granularity and again.k.dtype == np.float32
    assert np.array_equal(again.k, scales.k) and np.array_equal(again.v, scales.v)
    (tmp_path / "other").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("scales.safetensors", "other")]
    assert modes[0] == modes[1], "same permissions as any other file"


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_not_positive_and_finite_is_refused_with_its_layer(bad) -> None:
    k = np.ones((3, 1, 1), np.float32)
    k[2] = bad
    with pytest.raises(ConfigError, match="k scale of layer 2"):
        KVScales(k, np.ones((3, 1, 1)))


def test_shapes_that_match_no_granularity_or_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[layers, 1, 1\]"):
        KVScales(np.ones(3), np.ones(3))
    with pytest.raises(ConfigError, match="the same number"):
        KVScales(np.ones((2, 1, 1)), np.ones((3, 1, 1)))
    with pytest.raises(ConfigError, match="kv_heads=2"):
        check_shape(
            KVScales(np.ones((4, 3, 1)), np.ones((4, 1, 1))), layers=4, kv_heads=2, head_dim=8
        )


def test_mqa_has_channel_scales_and_offsets(tmp_path) -> None:
    """[layers, 1, head_dim] is valid for one KV head only."""
    scales = KVScales(np.full((2, 1, 4), 0.5), np.ones((2, 1, 1)), np.full((2, 1, 4), -3.0))
    scales.save(tmp_path / "scales.safetensors")
    again = KVScales.load(tmp_path / "scales.safetensors")
    assert again.granularity == "channel" and again.k.shape == again.k_offset.shape == (2, 1, 4)
    check_shape(again, layers=2, kv_heads=1, head_dim=4)
    with pytest.raises(ConfigError, match=r"must be \[2, 1, 1\], \[2, 3, 1\] or \[2, 3, 4\]"):
        check_shape(again, layers=2, kv_heads=3, head_dim=4)


def test_a_file_that_is_not_a_scales_file_is_named(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a KVScales file"):
        KVScales.load(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no such file"):
        KVScales.load(tmp_path / "y")


def test_scales_are_a_pytree() -> None:
    scales = KVScales.unit(2)
    assert jax.jit(lambda s: s.k + s.v)(scales).shape == (2, 1, 1)
    assert jax.tree.map(lambda x: x * 2, scales).k[0, 0, 0] == 2


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_dynamic_scale_is_the_smallest_power_of_two_that_fits_the_row(fmt) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 8)) * 10.0 ** rng.integers(-30, 30, (500, 1))).astype(np.float32)
    edges = fmt.largest * 2.0 ** np.arange(-20, 20)[:, None] * np.array([1, 1 + 2**-20, 1 - 2**-20])
    x = np.concatenate([x, np.repeat(edges.reshape(-1, 1), 8, axis=1).astype(np.float32)])
    scale = np.asarray(exponent_scale(token_head_exponent(jnp.asarray(x), fmt))).astype(np.float64)
    amax = np.abs(x).max(1).astype(np.float64)
    assert np.all(amax <= fmt.largest * scale)
    assert np.all((amax > fmt.largest * scale / 2) | (scale == 2.0**-126))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_dynamic_scale_ignores_zeros_infinities_and_nan(fmt) -> None:
    x = np.array([[0, 0], [np.inf, 1], [np.nan, 1], [3.4e38, 1], [1e-45, 0]], np.float32)
    exponent = token_head_exponent(jnp.asarray(x), fmt)
    scale, inverse = np.asarray(exponent_scale(exponent)), np.asarray(exponent_inverse(exponent))
    assert np.all(np.isfinite(scale) & (scale > 0) & np.isfinite(inverse) & (inverse > 0))
    assert np.array_equal(scale * inverse, np.ones(5, np.float32))
    assert (
        scale[1]
        == scale[2]
        == np.asarray(exponent_scale(token_head_exponent(jnp.ones((1, 2)), fmt)))[0]
    )
