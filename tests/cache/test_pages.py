"""Cache writes: the right bytes in the right slots, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.kernel_write import KernelWrite
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.pool import KVPool, LayerScales, fake_quant, new_pool, poison, read, write
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    FORMATS,
    encode_numpy,
    join_bytes,
    split_bytes,
)

LAYERS, PAGES, SIZE, HEADS, DIM = 3, 6, 4, 2, 8


BOTH_LAYOUTS = pytest.mark.parametrize(
    "keys_transposed", [True, False], ids=["keys transposed", "keys as values"]
)
# XLA writes either layout of keys, the kernel writes keys like values.
EACH_WRITE = pytest.mark.parametrize(
    ("write", "keys_transposed"),
    [
        pytest.param(write, True, id="keys transposed"),
        pytest.param(write, False, id="keys as values"),
        pytest.param(
            KernelWrite(interpret=True), False, id="kernel", marks=pytest.mark.quick_compile
        ),
    ],
)


def pool(fmt, dynamic: bool = False, keys_transposed: bool = True) -> KVPool:
    layout = PoolLayout.uniform(fmt, LAYERS, dynamic=dynamic, keys_transposed=keys_transposed)
    pages = new_pool(layout, num_pages=PAGES, page_size=SIZE, kv_heads=HEADS, head_dim=DIM)
    return poison(pages, fmt.nan_code)


def scales_of(granularity: str) -> LayerScales:
    shape = {"tensor": (LAYERS, 1, 1), "head": (LAYERS, HEADS, 1), "channel": (LAYERS, HEADS, DIM)}[
        granularity
    ]
    rng = np.random.default_rng(5)
    scales = KVScales(rng.uniform(0.01, 0.1, shape), rng.uniform(0.01, 0.1, shape))
    return LayerScales.of(scales, layers=LAYERS, kv_heads=HEADS, head_dim=DIM)


def tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(seed).normal(size=(2, count, HEADS, DIM)).astype(np.float32))


@EACH_WRITE
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_each_token_is_stored_in_its_slot_with_the_bytes_of_numpy(
    fmt, granularity, write, keys_transposed
) -> None:
    scales, table, start, length = scales_of(granularity), [4, 1, 3], 3, 9
    k, v = tokens(length - start)
    at = {
        "layer": 1,
        "page_table": jnp.int32(table),
        "start": jnp.int32(start),
        "length": jnp.int32(length),
    }
    pages = pool(fmt, keys_transposed=keys_transposed)
    got = jax.jit(lambda p, k, v: write(p, scales, k, v, **at))(pages, k, v)
    want_k, want_v = np.array(pages.k_bits), np.array(pages.v_bits)
    for i, position in enumerate(range(start, length)):
        row, offset = PAGES * 1 + table[position // SIZE], position % SIZE
        slot = (
            (row, slice(None), slice(None), offset)
            if keys_transposed
            else (row, slice(None), offset)
        )
        want_k[slot] = encode_numpy(k[i] * np.asarray(scales.k_inverse)[1], fmt)
        want_v[row, :, offset] = encode_numpy(v[i] * np.asarray(scales.v_inverse)[1], fmt)
    assert np.array_equal(np.asarray(got.k_bits), want_k, equal_nan=True)
    assert np.array_equal(np.asarray(got.v_bits), want_v, equal_nan=True)
    shown = want_k.swapaxes(2, 3) if keys_transposed else want_k
    assert np.array_equal(
        np.asarray(got.k).view(fmt.storage_dtype), np.ascontiguousarray(shown), equal_nan=True
    )


@EACH_WRITE
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_dynamic_scales_are_stored_next_to_their_tokens(fmt, write, keys_transposed) -> None:
    k, v = tokens(5)
    k[2, 0] *= 1e4
    at = {
        "layer": 2,
        "page_table": jnp.int32([0, 5]),
        "start": jnp.int32(0),
        "length": jnp.int32(5),
    }
    got = write(pool(fmt, True, keys_transposed), None, jnp.asarray(k), jnp.asarray(v), **at)
    k_bits = got.k_bits.swapaxes(2, 3) if keys_transposed else got.k_bits
    for x, bits, exponent in ((k, k_bits, got.k_exponent), (v, got.v_bits, got.v_exponent)):
        for i in range(5):
            row, offset = 2 * PAGES + [0, 5][i // SIZE], i % SIZE
            scale = 2.0 ** (np.asarray(exponent)[row, :, offset].astype(np.float64) - 127)
            stored = np.asarray(bits)[row, :, offset].view(fmt.dtype).astype(np.float64)
            bound = np.maximum(
                np.abs(x[i]) / 2 ** (fmt.mantissa_bits + 1),
                scale[:, None] * fmt.smallest_subnormal / 2,
            )
            assert np.all(np.abs(stored * scale[:, None] - x[i]) <= bound)


@EACH_WRITE
@pytest.mark.parametrize(
    ("start", "length"), [(0, 0), (0, 1), (3, 4), (4, 5), (7, 8), (0, 8), (5, 5)]
)
def test_padding_and_tokens_past_the_page_table_are_dropped(
    start, length, write, keys_transposed
) -> None:
    k, v = tokens(6)
    at = {
        "layer": 0,
        "page_table": jnp.int32([2, PAGES]),
        "start": jnp.int32(start),
        "length": jnp.int32(length),
    }
    before = pool(E4M3, keys_transposed=keys_transposed)
    got = np.asarray(
        write(before, scales_of("tensor"), jnp.asarray(k), jnp.asarray(v), **at).v_bits
    )
    written = {(int(r), int(o)) for r, _, o, _ in np.argwhere(got != E4M3.nan_code)}
    inside = range(start, min(length, start + 6, SIZE))  # the second entry is past the end
    assert written == {(2, position) for position in inside}


@EACH_WRITE
def test_a_vmapped_write_equals_sequential_writes_into_the_shared_pool(
    write, keys_transposed
) -> None:
    scales = scales_of("head")
    k, v = (jnp.stack(x) for x in zip(tokens(3, 1), tokens(3, 2), strict=True))
    tables, starts, lengths = jnp.int32([[0, 1], [2, 3]]), jnp.int32([0, 3]), jnp.int32([2, 6])

    def one(pages, k, v, table, start, length):
        return write(pages, scales, k, v, layer=1, page_table=table, start=start, length=length)

    apart = pool(E5M2, keys_transposed=keys_transposed)
    together = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, 0, 0), out_axes=None))(
        apart, k, v, tables, starts, lengths
    )
    for i in range(2):
        apart = one(apart, k[i], v[i], tables[i], starts[i], lengths[i])
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True)
    )


def test_the_pool_returns_its_values_as_float8() -> None:
    pages = new_pool(PoolLayout.uniform(E4M3, 1), num_pages=2, page_size=4, kv_heads=1, head_dim=8)
    assert (pages.k.dtype, pages.v.dtype, pages.num_pages, pages.page_size) == (
        E4M3.dtype,
        E4M3.dtype,
        2,
        4,
    )


MIXED = (
    LayerCacheSpec(E4M3),
    LayerCacheSpec(BFLOAT16),
    LayerCacheSpec(E5M2, True),
    LayerCacheSpec(FLOAT32),
    LayerCacheSpec(FLOAT16),
    LayerCacheSpec(E4M3, True),
)


@BOTH_LAYOUTS
def test_layers_of_a_mixed_pool_round_like_numpy_and_share_no_bytes(
    keys_transposed,
) -> None:
    layers = len(MIXED)
    layout = PoolLayout.of(
        MIXED, LayerGroups.of([0] * layers, slot_widths(MIXED)), keys_transposed=keys_transposed
    )
    rng = np.random.default_rng(1)
    static = KVScales(
        *rng.uniform(0.01, 0.1, (2, layers, HEADS, 1)),
        k_offset=rng.normal(size=(layers, HEADS, DIM)),
    )
    scales = LayerScales.of(static, layers=layers, kv_heads=HEADS, head_dim=DIM)
    pages = poison(
        new_pool(layout, num_pages=PAGES, page_size=SIZE, kv_heads=HEADS, head_dim=DIM), 0xFF
    )
    table = jnp.int32([4, 1])
    put = jax.jit(
        lambda p, k, v, layer: write(
            p, scales, k, v, layer=layer, page_table=table, start=jnp.int32(0), length=jnp.int32(6)
        )
    )
    for layer in range(layers):
        pages = put(pages, *tokens(6, seed=layer), jnp.int32(layer))
    get = jax.jit(lambda p, layer: read(p, scales, layer=layer, page_table=table))
    for layer, spec in enumerate(MIXED):
        k, v = tokens(6, seed=layer)
        offset = np.asarray(scales.k_offset)[layer]
        for x, which, got, less in zip(
            (k, v), "kv", get(pages, jnp.int32(layer)), (offset, 0 * offset), strict=True
        ):
            if spec.dynamic:
                scale = np.exp2(np.ceil(np.log2(np.abs(x - less).max(-1) / spec.fmt.largest)))[
                    ..., None
                ]
            else:
                scale = np.asarray(getattr(scales, which))[layer]
            inverse = (np.float32(1) / scale).astype(np.float32)
            want = (
                encode_numpy((x - less) * inverse, spec.fmt).view(spec.fmt.dtype).astype(np.float32)
                * scale
                + less
            )
            np.testing.assert_array_equal(got[:6], want.astype(np.float32))
            alone = fake_quant(spec, scales, jnp.asarray(k), jnp.asarray(v), layer=layer)
            np.testing.assert_array_equal(alone["kv".index(which)], want.astype(np.float32))
    written = [x for x in jax.tree.leaves(pages)]
    assert all(
        np.all(np.asarray(x).reshape(-1, PAGES, *x.shape[1:])[:, [0, 2, 3, 5]] == 0xFF)
        for x in written
    )


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_elements_are_split_into_bytes_from_high_to_low(fmt) -> None:
    bits = np.arange(7, dtype=np.uint32).astype(fmt.storage_dtype) * np.float32(1.1).astype(
        fmt.storage_dtype
    ) + np.array(3, fmt.storage_dtype)
    parts = split_bytes(jnp.asarray(bits))
    want = bits[:, None].view(np.uint8)[:, ::-1].T
    assert np.array_equal(np.stack(parts), want)
    assert np.array_equal(join_bytes(parts, fmt), bits)
