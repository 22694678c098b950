"""`kv_write`, interpreted, against a NumPy loop over tokens and heads: whole pools, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import NotSupported, UpdatedPools, WriteBlocks, kv_write
from pallas_kernels.fp8 import BFLOAT16, E4M3, E5M2, ELEMENTS, FLOAT32
from pallas_kernels.kv_write.blocks import choose_blocks
from pallas_kernels.kv_write.reference import kv_write_reference

pytestmark = pytest.mark.quick_compile

PAST_THE_END = 2**30
each_scale = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
each_element = pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)


def poisoned(shape: tuple[int, ...], element: np.dtype) -> np.ndarray:
    """Return a pool of NaN codes."""
    if element == FLOAT32:
        return np.full(shape, np.nan, np.float32)
    return (
        np.full(shape, 0x7F, np.uint8)
        if element.itemsize == 1
        else np.full(shape, 0x7FFF, np.uint16)
    )


def new(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return numbers of many magnitudes, with a few infinities, NaNs and zeros."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-14, 10, shape[:-1])[..., None]
    special = rng.choice(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0]), shape)
    return np.where(rng.random(shape) < 0.02, special, x).astype(np.float32).astype(dtype)


def case(
    *,
    tokens=5,
    spans=((0, 5), (3, 6), (14, 19), (0, 0), (9, 2)),
    kv_heads=2,
    head_dim=16,
    page_size=4,
    element=E4M3,
    dtype=ml_dtypes.bfloat16,
    dynamic=False,
    offset=False,
    layers=2,
    layer=1,
    seed=0,
) -> dict:
    """Return the arguments of a write to shuffled pages of one of several layers.

    Request `r` writes positions `spans[r][0]` to `spans[r][1]`. Page table entries after the length
    of a request are past the end.
    """
    rng = np.random.default_rng(seed)
    requests = len(spans)
    pages = -(-max(end for _, end in spans) // page_size) + 1
    numbers = rng.permutation(requests * pages).reshape(requests, pages)
    start, lengths = np.array(spans, np.int32).T
    table = np.where(np.arange(pages) * page_size < lengths[:, None], numbers, PAST_THE_END).astype(
        np.int32
    )
    pool = (layers * requests * pages, kv_heads, page_size, head_dim)
    given = {
        "k": new(rng, (requests, tokens, kv_heads, head_dim), dtype),
        "v": new(rng, (requests, tokens, kv_heads, head_dim), dtype),
        "k_pages": poisoned(pool, element),
        "v_pages": poisoned(pool, element),
        "page_table": table,
        "start": start,
        "lengths": lengths,
        "first_row": np.int32(layer * requests * pages),
    }
    channels = (kv_heads, head_dim)
    if dynamic:
        given |= {name: np.full(pool[:3], 255, np.uint8) for name in ("k_exponent", "v_exponent")}
    else:
        given |= {
            name: rng.uniform(0.1, 4, channels).astype(np.float32)
            for name in ("k_inverse", "v_inverse")
        }
    return given | (
        {"k_offset": rng.standard_normal(channels).astype(np.float32)} if offset else {}
    )


def bits(x) -> np.ndarray | None:
    return None if x is None else np.asarray(x).view(f"u{x.dtype.itemsize}")


def check(given: dict, *, element: np.dtype, **options) -> UpdatedPools:
    write = jax.jit(functools.partial(kv_write, element=element, interpret=True, **options))
    done = write(**jax.tree.map(jnp.asarray, given))
    with np.errstate(over="ignore", invalid="ignore"):
        want = kv_write_reference(**given, element=element)
    for got, wanted in zip(done, want, strict=True):
        if wanted is None:
            assert got is None
        else:
            np.testing.assert_array_equal(bits(got), bits(wanted))
    return done


@each_element
def test_every_element_type_is_stored_as_by_the_reference(element):
    check(case(element=element, offset=True), element=element)


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda e: e.name)
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
def test_dynamic_scales_equal_those_of_the_reference(element, offset):
    check(case(element=element, dynamic=True, offset=offset), element=element)


@pytest.mark.parametrize(
    "dtype, dynamic", [(np.float16, False), (np.float32, True)], ids=["float16", "float32"]
)
def test_keys_and_values_of_any_dtype_are_written(dtype, dynamic):
    check(case(dtype=dtype, dynamic=dynamic), element=E4M3)


@pytest.mark.parametrize("page_size, dynamic", [(1, True), (5, False), (5, True), (16, False)])
def test_pages_of_any_size_are_written(page_size, dynamic):
    check(case(page_size=page_size, dynamic=dynamic), element=E4M3)


@pytest.mark.parametrize(
    "head_dim, dynamic", [(8, True), (64, False), (80, False), (80, True), (96, True), (128, False)]
)
def test_heads_of_any_size_are_written(head_dim, dynamic):
    check(case(head_dim=head_dim, dynamic=dynamic, offset=True), element=E4M3)


@pytest.mark.parametrize(
    "tokens, kv_heads, dynamic",
    [
        (1, 1, True),
        (1, 3, True),
        (1, 8, False),
        (2, 3, False),
        (37, 1, False),
        (37, 3, True),
        (37, 8, False),
    ],
)
def test_any_number_of_tokens_and_heads_is_written(tokens, kv_heads, dynamic):
    spans = ((0, tokens), (4, 4 + tokens), (7, 7 + (tokens + 1) // 2), (3, 3), (0, 0))
    check(
        case(
            tokens=tokens, spans=spans, kv_heads=kv_heads, head_dim=64, page_size=8, dynamic=dynamic
        ),
        element=E4M3,
    )


@pytest.mark.parametrize("blocks", [(1, 1, 1), (2, 4, 1), (8, 1, 2), (4, 2, 4)], ids=str)
def test_block_sizes_do_not_change_the_result(blocks):
    check(case(kv_heads=3, dynamic=True), element=E4M3, blocks=WriteBlocks(*blocks))


def test_without_scales_values_are_stored_unscaled():
    given = case()
    del given["k_inverse"], given["v_inverse"]
    check(given, element=E4M3)


def test_pools_may_have_the_element_dtype_instead_of_bits():
    given = case(dynamic=True)
    given |= {name: given[name].view(E4M3) for name in ("k_pages", "v_pages")}
    done = check(given, element=E4M3)
    assert done.k_pages.dtype == done.v_pages.dtype == E4M3


def test_exponents_may_start_at_another_row():
    given = case(dynamic=True)
    exponents = {
        name: given[name][: len(given[name]) // 2] for name in ("k_exponent", "v_exponent")
    }
    check(given | exponents | {"first_exponent_row": np.int32(0)}, element=E4M3)


def test_other_slots_are_unchanged():
    """Without the reference: one changed slot per token and head, and none in another layer."""
    given = case(dynamic=True, dtype=np.float32)
    given |= {name: np.where(np.isfinite(given[name]), given[name], np.float32(1)) for name in "kv"}
    done = check(given, element=E4M3)
    written = np.maximum(given["lengths"] - given["start"], 0).sum()
    for pool, empty in (
        (done.k_pages, 127),
        (done.v_pages, 127),
        (done.k_exponent, 255),
        (done.v_exponent, 255),
    ):
        pool = np.asarray(pool)
        changed = pool.reshape(*pool.shape[:3], -1) != empty
        assert (changed.all(axis=-1) == changed.any(axis=-1)).all() and not changed[
            : given["first_row"]
        ].any()
        assert changed.all(axis=-1).sum() == written * given["k"].shape[2]


@each_scale
def test_a_scan_over_layers_writes_in_place_to_the_rows_of_each_layer(dynamic):
    layers = [case(layers=3, layer=layer, dynamic=dynamic, seed=layer) for layer in range(3)]
    names = ("k_pages", "v_pages", *(("k_exponent", "v_exponent") if dynamic else ()))
    want = {name: layers[0][name] for name in names}
    pools = {name: jnp.asarray(pool) for name, pool in want.items()}
    given = [{name: x for name, x in layer.items() if name not in names} for layer in layers]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pools, given):
        def layer(pools, one):
            done = kv_write(**pools, **one, element=E4M3, interpret=True)
            return {name: getattr(done, name) for name in names}, None

        return jax.lax.scan(layer, pools, given)[0]

    got = step(pools, jax.tree.map(lambda *x: jnp.stack(x), *given))
    for one in given:
        done = UpdatedPools(*kv_write_reference(**want, **one, element=E4M3))
        want = {name: getattr(done, name) for name in names}
    for name in names:
        assert pools[name].is_deleted()
        np.testing.assert_array_equal(np.asarray(got[name]), want[name])


@each_scale
def test_two_chunks_write_the_same_as_one(dynamic):
    """The lengths of the first chunk's requests exceed its tokens."""
    given = case(tokens=9, spans=((0, 9), (2, 5), (6, 13), (3, 11)), dynamic=dynamic)
    whole = check(given, element=E4M3)
    part = check(given | {"k": given["k"][:, :3], "v": given["v"][:, :3]}, element=E4M3)
    pools = {name: np.asarray(pool) for name, pool in part._asdict().items() if pool is not None}
    rest = {"k": given["k"][:, 3:], "v": given["v"][:, 3:], "start": given["start"] + 3}
    for got, wanted in zip(check(given | pools | rest, element=E4M3), whole, strict=True):
        assert wanted is None or (got == wanted).all()


def primitives(jaxpr) -> set[str]:
    """Return the primitives outside of kernels."""
    inner = [e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "jit"]
    return {e.primitive.name for e in jaxpr.eqns if e.primitive.name != "jit"}.union(
        *map(primitives, inner)
    )


@each_scale
def test_nothing_is_computed_outside_the_kernel(dynamic):
    given = jax.tree.map(jnp.asarray, case(dynamic=dynamic, offset=True))
    traced = jax.make_jaxpr(lambda given: kv_write(**given, element=E4M3, interpret=True))(given)
    assert primitives(traced.jaxpr) <= {"pallas_call", "reshape"}


def test_a_thread_stores_16_bytes_if_there_is_work_for_all_multiprocessors():
    shapes = {"kv_heads": 8, "head_dim": 128}
    assert choose_blocks(requests=64, tokens=1, element=E4M3, **shapes) == WriteBlocks(1, 4, 4)
    assert choose_blocks(requests=1024, tokens=1, element=E4M3, **shapes) == WriteBlocks(1, 4, 1)
    assert choose_blocks(requests=8, tokens=512, element=E4M3, **shapes) == WriteBlocks(16, 1, 4)
    assert choose_blocks(requests=8, tokens=512, element=BFLOAT16, **shapes) == WriteBlocks(8, 1, 4)


def pools(kind: str, dtype, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return zeros for keys and values: `kind` is "pages" or "exponent"."""
    return {f"k_{kind}": np.zeros(shape, dtype), f"v_{kind}": np.zeros(shape, dtype)}


@pytest.mark.parametrize(
    "change, element, error, message",
    [
        (pools("pages", np.int8, (40, 2, 4, 16)), np.int8, NotSupported, "int8"),
        ({}, BFLOAT16, NotSupported, "byte-split"),
        ({"k": np.zeros((5, 5, 2, 16), np.float32)}, E4M3, NotSupported, "values of bfloat16"),
        ({"v_pages": np.zeros((40, 2, 8, 16), np.uint8)}, E4M3, ValueError, "both must be equal"),
        ({"k_exponent": np.zeros((40, 2, 4), np.uint8)}, E4M3, ValueError, "both or neither"),
        (pools("exponent", np.uint8, (40, 2, 4)), E4M3, ValueError, "dynamic or static"),
        (pools("pages", np.uint8, (40, 4, 4, 16)), E4M3, ValueError, "k of shape"),
    ],
)
def test_unsupported_writes_are_rejected(change, element, error, message):
    with pytest.raises(error, match=message):
        kv_write(**jax.tree.map(jnp.asarray, case() | change), element=element, interpret=True)


def test_pools_too_large_for_32_bit_offsets_are_rejected():
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case().items()}
    pool = jax.ShapeDtypeStruct((2**31 // 128 + 1, 2, 4, 16), jnp.uint8)
    with pytest.raises(NotSupported, match="2 and 4 GiB"):
        jax.eval_shape(
            functools.partial(kv_write, element=E4M3), **given | {"k_pages": pool, "v_pages": pool}
        )
