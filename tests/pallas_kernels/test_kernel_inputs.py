"""Unsupported and inconsistent arguments: `NotSupported` and `ValueError`. Choice of blocks."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LayerView, NotSupported
from pallas_kernels.backend import check_offsets, power_of_two
from pallas_kernels.fp8 import BFLOAT16, E4M3, FLOAT16, FLOAT32
from pallas_kernels.kernel_inputs import check_attention
from pallas_kernels.paged_decode.blocks import MAX_SPLITS, choose_blocks
from pallas_kernels.testing import KERNELS, Batch, call


def pool(dtype: object = np.uint8, *, kv_heads: int = 2, head_dim: int = 64) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), (4, kv_heads, 16, head_dim))


def check(
    k_pages=None,
    v_pages=None,
    *,
    q_heads=6,
    head_dim=64,
    q_dtype=jnp.bfloat16,
    element=E4M3,
    exponents=(None, None),
):
    k_pages = pool() if k_pages is None else k_pages
    k_exponent, v_exponent = exponents
    view = LayerView(
        k_pages,
        k_pages if v_pages is None else v_pages,
        k_exponent=k_exponent,
        v_exponent=v_exponent,
    )
    return check_attention(q_heads, head_dim, q_dtype, view, element)


def test_the_types_of_element_and_operands_and_the_group_are_returned() -> None:
    assert check() == (E4M3, FLOAT16, 3)
    assert check(pool(BFLOAT16), element=None) == (BFLOAT16, BFLOAT16, 3)
    assert check(pool(head_dim=256), head_dim=256, q_heads=2, q_dtype=jnp.float32) == (
        E4M3,
        FLOAT32,
        1,
    )


UNSUPPORTED = {
    "element": ({"element": np.dtype(np.int8)}, "int8: the kernels support float8_e4m3fn, "),
    "plain bits": ({"element": None}, "pages of uint8"),
    "byte-split": ({"element": BFLOAT16}, "uint8 with byte-split bfloat16"),
    "head_dim": (
        {"k_pages": pool(head_dim=320), "head_dim": 320},
        "head_dim=320: the kernels support at most 256",
    ),
    "scales": (
        {"k_pages": pool(np.uint16), "element": BFLOAT16, "exponents": (1, 1)},
        "token-head scales require FP8 pages, got bfloat16",
    ),
}


@pytest.mark.parametrize(("given", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_pools_raise_not_supported(given, message) -> None:
    with pytest.raises(NotSupported, match=message):
        check(**given)


INCONSISTENT = {
    "values unlike keys": {"v_pages": pool(kv_heads=1)},
    "another head_dim": {"head_dim": 32},
    "heads that do not group": {"q_heads": 5},
    "one exponent": {"exponents": (1, None)},
}


@pytest.mark.parametrize("given", INCONSISTENT.values(), ids=INCONSISTENT)
def test_inconsistent_shapes_raise_value_error(given) -> None:
    with pytest.raises(ValueError, match=r"both|must divide"):
        check(**given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_kernels_check_their_arguments(kernel) -> None:
    arguments = {name: jnp.asarray(x) for name, x in Batch().arguments(kernel).items()}
    with pytest.raises(NotSupported, match="byte-split"):
        call(kernel, arguments, element=FLOAT32)
    with pytest.raises(ValueError, match="both or neither"):
        call(kernel, arguments, element=E4M3, k_exponent=jnp.zeros((36, 2, 4), jnp.uint8))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_with_other_heads_or_page_sizes_raise_value_error(kernel) -> None:
    arguments = {name: jnp.asarray(x) for name, x in Batch().arguments(kernel).items()}
    # Pages have 2 heads and 4 tokens.
    scale = jnp.ones((1, 32))
    exponents = jnp.zeros((36, 2, 8), jnp.uint8)
    with pytest.raises(ValueError, match=r"k_scale has shape \(1, 32\), .* must have \(2, 32\)"):
        call(kernel, arguments, element=E4M3, k_scale=scale)
    with pytest.raises(ValueError, match=r"k_exponent has shape \(2, 8\), .* must have \(2, 4\)"):
        call(kernel, arguments, element=E4M3, k_exponent=exponents, v_exponent=exponents)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_batch_gives_an_empty_output(kernel) -> None:
    arguments = {name: jnp.asarray(x) for name, x in Batch().arguments(kernel).items()}
    none = {
        name: arguments[name][:0]
        for name in ("page_table", "lengths", "first_query", "queries")
        if name in arguments
    }
    if kernel == "prefill":
        assert not np.any(call(kernel, arguments | none, element=E4M3)), "padding rows"
        assert call(kernel, arguments | {"q": arguments["q"][:0]}, element=E4M3).shape == (0, 6, 32)
    else:
        assert call(kernel, arguments | none | {"q": arguments["q"][:0]}, element=E4M3).shape == (
            0,
            6,
            32,
        )


def test_byte_pools_between_2_and_4_gib_are_not_supported() -> None:
    def array(size: int, dtype: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(shape=(size,), dtype=np.dtype(dtype))

    for size in (2**31 + 1, 3 * 2**30, 2**32):
        with pytest.raises(NotSupported, match="between 2 and 4 GiB"):
            check_offsets("k", array(size, np.uint8))
        check_offsets("k", array(size, np.uint16))
    for size in (1, 2**31, 2**32 + 1, 2**36):
        for dtype in (np.uint8, np.uint16, np.float32):
            check_offsets("k", array(size, dtype))
    with pytest.raises(NotSupported, match=r"k of 3\.00 GiB"):
        check_offsets("k", types.SimpleNamespace(shape=(3, 1024, 1024, 1024), dtype=np.dtype(E4M3)))


def test_power_of_two_rounds_up() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 96, 128, 129)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        128,
        128,
        256,
    ]


def test_decode_is_split_into_just_enough_programs_to_fill_the_gpu() -> None:
    def splits(requests: int, tokens: int) -> int:
        shape = {
            "kv_heads": 8,
            "group": 4,
            "head_dim": 128,
            "element": E4M3,
            "compute": FLOAT16,
        }
        return choose_blocks(requests=requests, tokens=tokens, cores=132, **shape).splits

    assert splits(256, 8192) == 1 and splits(64, 8192) == 2
    assert splits(1, 8192) == 128 and splits(1, 1 << 20) == 128
    assert splits(1, 64) == 2 and splits(1, 32) == 1 and splits(1, 0) == 1
    assert all(1 <= splits(r, 1 << 20) <= MAX_SPLITS for r in range(1, 300))
