"""Selection of the attention backend: a fallback to XLA on a GPU is logged once."""

import logging

import jax
import jax.numpy as jnp
import pytest

from jfp8kv.attention import dispatch
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.kernel_write import KernelWrite
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool
from jfp8kv.cache.scales import KVScales
from jfp8kv.core import log
from jfp8kv.core.formats import BFLOAT16, E4M3

SIZES = {"page_size": 4, "kv_heads": 1, "head_dim": 16}


@pytest.fixture(autouse=True)
def no_earlier_warnings() -> None:
    log.warn_once.cache_clear()


def mixed_pool() -> KVPool:
    """Return a pool with an FP8 layer and a byte-split bfloat16 layer."""
    specs = (LayerCacheSpec(E4M3), LayerCacheSpec(BFLOAT16))
    groups = LayerGroups.of([0, 0], slot_widths(specs))
    return new_pool(PoolLayout.of(specs, groups, keys_transposed=False), num_pages=2, **SIZES)


def warnings_in(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_gpu_without_kernels_falls_back_to_xla_with_one_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # the device is still a CPU
    for _ in range(2):
        backend = dispatch.select_backend()
        assert backend.name == "xla" and "needs an NVIDIA GPU" in backend.reason
    (message,) = warnings_in(caplog)
    assert "attention falls back to XLA" in message and "needs an NVIDIA GPU" in message


def test_xla_on_a_cpu_is_not_a_fallback(caplog) -> None:
    assert dispatch.select_backend().name == "xla"
    assert not warnings_in(caplog)


def test_the_selected_backend_is_logged_with_its_reason(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="jfp8kv"):
        dispatch.select_backend("reference")
    assert "attention backend: reference (requested)" in caplog.messages


def test_layers_that_the_kernels_cannot_read_are_named_and_logged(caplog) -> None:
    pool = mixed_pool()
    backend = dispatch.select_backend("pallas_interpret", pool)
    assert "'xla' for layers of bfloat16" in backend.reason
    length = jnp.int32(1)
    metadata = AttentionMetadata(jnp.int32([0]), jnp.int32(0), length, length)
    scales = LayerScales.of(KVScales.unit(2), layers=2, kv_heads=1, head_dim=16)
    pages = pool.for_spec(LayerCacheSpec(BFLOAT16))
    backend.attend(jnp.ones((1, 1, 16)), pages, scales, AttentionOptions(), metadata, layer=1)
    assert any("attention of bfloat16 layers falls back to XLA" in m for m in warnings_in(caplog))


def test_writes_to_a_mixed_pool_fall_back_to_xla_with_a_warning(caplog) -> None:
    scales = LayerScales.of(KVScales.unit(2), layers=2, kv_heads=1, head_dim=16)
    new = jnp.ones((1, 1, 16))
    KernelWrite(interpret=True)(
        mixed_pool(),
        scales,
        new,
        new,
        layer=0,
        page_table=jnp.int32([0]),
        start=jnp.int32(0),
        length=jnp.int32(1),
    )
    (message,) = warnings_in(caplog)
    assert "cache writes fall back to XLA: the layers have several formats" in message
