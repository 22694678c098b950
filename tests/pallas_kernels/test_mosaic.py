"""The experimental decode kernel on Mosaic GPU: refused by old versions of jax, interpreted and lowered for Hopper by new ones.

What the interpreter cannot show: layouts of registers and shared memory, and barriers among the warps of a program. Lowering
checks the first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import MosaicBlocks, NotSupported, paged_decode_mosaic
from pallas_kernels.elements import BFLOAT16, E4M3, E5M2, FLOAT16

NEW = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not NEW, reason="Mosaic GPU as this kernel needs it came with jax 0.11")
OUTSIDE = 1 << 20  # a page that no pool has
STATIC = ("sm_scale", "softcap")


def batch(*, element=E4M3, kv_heads=1, group=4, head_dim=64, page_size=64, lengths=(100, 0, 3), dynamic=False, seed=0) -> dict:
    """Requests on shuffled pages of the second of two layers. Slots of no token hold NaN codes and exponents 255."""
    rng = np.random.default_rng(seed)
    pages = -(-max(lengths) // page_size)
    used = np.arange(pages) * page_size < np.array(lengths)[:, None]
    numbers = rng.permutation(used.size).reshape(used.shape)
    shape = (2 * used.size, kv_heads, page_size, head_dim)
    written = np.zeros((shape[0], page_size), bool)
    for request, length in enumerate(lengths):
        for token in range(length):
            written[used.size + numbers[request, token // page_size], token % page_size] = True
    bits = np.uint8 if element.itemsize == 1 else np.uint16
    given = {
        "q": rng.standard_normal((len(lengths), kv_heads * group, head_dim)).astype(ml_dtypes.bfloat16),
        "page_table": np.where(used, numbers, OUTSIDE).astype(np.int32),
        "lengths": np.int32(lengths),
        "first_row": np.int32(used.size),
    }
    for name in ("k_pages", "v_pages"):
        codes = rng.standard_normal(shape).astype(element).view(bits)
        given[name] = np.where(written[:, None, :, None], codes, np.iinfo(bits).max)
    if dynamic:
        for name, (low, high) in {"k_exponent": (124, 129), "v_exponent": (90, 160)}.items():
            given[name] = np.where(written[:, None], rng.integers(low, high, shape[:3]), 255).astype(np.uint8)
    return given


def expected(given: dict[str, Any], element: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Attention head by head in float64, and how far float16 (bfloat16) operands may be from it.

    A query's channels and a weight are off by half a unit in the last place, `u`. So scores are off by `u * sum |q k|`, weights
    by the factor `exp` of twice that and by `u`; sums and `exp2` in float32 take their share, and the output is rounded.
    """
    u = 2.0**-9 if element == BFLOAT16 else 2.0**-12
    q, heads = given["q"].astype(np.float64), given["q"].shape[1] // given["k_pages"].shape[1]
    out, bound = np.zeros(q.shape), np.zeros(q.shape)
    for request, length in enumerate(given["lengths"]):
        first = max(0, length - given.get("window", 0)) if given.get("window", 0) else 0
        for head in range(q.shape[1] if length else 0):
            keys, values = (tokens(given, name, element, request, head // heads, range(first, length)) for name in "kv")
            scale = given.get("sm_scale", q.shape[2] ** -0.5)
            scores = keys @ q[request, head] * scale
            unsure = np.max(np.abs(keys) @ np.abs(q[request, head])) * scale * (2 * u + 2.0**-20)
            if "score_offset" in given:
                scores = scores + given["score_offset"][request, head]
            if "softcap" in given:
                scores = given["softcap"] * np.tanh(scores / given["softcap"])
            peak = max(scores.max(), given["sinks"][head]) if "sinks" in given else scores.max()
            weights = np.exp(scores - peak)
            total = weights.sum() + (np.exp(given["sinks"][head] - peak) if "sinks" in given else 0)
            out[request, head] = weights @ values / total
            off = np.expm1(2 * unsure) + u + 2.0**-16
            smallest = 2.0**-35 * np.max(np.abs(values), axis=0) * len(values)  # what of a weight float16 loses below 2**-24
            bound[request, head] = off * (weights @ np.abs(values) / total) + smallest + 2.0**-9 * np.abs(out[request, head])
    return out, bound


def tokens(given: dict[str, Any], name: str, element: np.dtype, request: int, kv_head: int, which: range) -> np.ndarray:
    """`[tokens, head_dim]` real keys or values of a request."""
    found = []
    for token in which:
        page, offset = divmod(token, given[f"{name}_pages"].shape[2])
        slot = given["first_row"] + given["page_table"][request, page], kv_head, offset
        value = given[f"{name}_pages"][slot].view(element).astype(np.float64)
        if f"{name}_exponent" in given:
            value = value * 2.0 ** (float(given[f"{name}_exponent"][slot]) - 127)
        if f"{name}_scale" in given:
            value = value * given[f"{name}_scale"][kv_head]
        found.append(value)
    return np.array(found)


def call(given: dict[str, Any], **options: Any) -> jax.Array:
    given = {name: x if name in STATIC else jnp.asarray(x) for name, x in given.items()}
    order = [given.pop(name) for name in ("q", "k_pages", "v_pages", "page_table", "lengths")]
    return paged_decode_mosaic(*order, **given, **options)


def check(given: dict[str, Any], element: np.dtype, blocks: MosaicBlocks) -> None:
    static = {name: given[name] for name in STATIC if name in given}
    arrays = {name: x for name, x in given.items() if name not in static}
    run = jax.jit(functools.partial(call, element=element, blocks=blocks, interpret=True, **static))
    got = np.asarray(run(arrays)).astype(np.float64)
    want, bound = expected(given, element)
    assert np.isfinite(got).all()
    assert np.all(np.abs(got - want) <= bound), f"{np.max(np.abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


@pytest.mark.skipif(NEW, reason="this jax has what the kernel needs")
def test_an_older_jax_is_refused_by_its_version():
    with pytest.raises(NotSupported, match=rf"needs jax >= 0.11, and this is jax {jax.__version__}"):
        call(batch(), element=E4M3)


@needs_mosaic
@pytest.mark.parametrize("element", [E4M3, E5M2, BFLOAT16, FLOAT16], ids=lambda e: e.name)
def test_it_agrees_for_every_element(element):
    check(batch(element=element), element, MosaicBlocks(64, 2, 1))


@needs_mosaic
@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
def test_it_agrees_for_pages_smaller_and_larger_than_a_block(page_size):
    check(batch(page_size=page_size), E4M3, MosaicBlocks(64, 2, 1))


@needs_mosaic
def test_blocks_of_two_instructions_and_shares_of_the_keys_agree():
    check(batch(lengths=(300, 1), page_size=32), E4M3, MosaicBlocks(128, 2, 2))


@needs_mosaic
def test_a_large_group_is_cut_into_tiles():
    check(batch(group=40, lengths=(70,)), E4M3, MosaicBlocks(64, 2, 1))


@needs_mosaic
@pytest.mark.parametrize("head_dim", [128, 256])
def test_it_agrees_for_larger_heads(head_dim):
    check(batch(head_dim=head_dim, kv_heads=2, group=1, lengths=(70,)), E4M3, MosaicBlocks(64, 2, 1))


@needs_mosaic
def test_what_a_window_hides_is_not_read():
    given = batch(lengths=(150, 20))
    for token in range(150 - 30):
        row = given["first_row"] + given["page_table"][0, token // 64]
        given["k_pages"][row, :, token % 64] = given["v_pages"][row, :, token % 64] = 255
    given["page_table"][0, 0] = OUTSIDE
    check(given | {"window": np.int32(30)}, E4M3, MosaicBlocks(64, 2, 1))


@needs_mosaic
def test_options_of_scores_agree_in_one_call():
    rng = np.random.default_rng(1)
    scales = {name: np.float32(rng.uniform(0.5, 2, (2, 64))) for name in ("k_scale", "v_scale")}
    extra = {"sinks": np.float32(rng.standard_normal(6)), "score_offset": np.float32(rng.standard_normal((2, 6)))}
    given = batch(kv_heads=2, group=3, lengths=(90, 0)) | scales | extra | {"softcap": 3.0, "sm_scale": 0.2}
    check(given, E4M3, MosaicBlocks(64, 2, 2))


@needs_mosaic
def test_the_layers_part_is_taken_of_what_all_layers_have():
    rng = np.random.default_rng(2)
    scales = {name: np.float32(rng.uniform(0.5, 2, (2, 1, 64))) for name in ("k_scale", "v_scale")}
    scales |= {"sinks": np.float32(rng.standard_normal((2, 4))), "window": np.int32([3, 40])}
    given = batch(lengths=(90, 2))
    one = {name: x[1] for name, x in scales.items()}
    whole = scales | {"first_row": np.int32([0, given["first_row"]]), "layer": np.int32(1)}
    run = functools.partial(call, element=E4M3, blocks=MosaicBlocks(64, 2, 1), interpret=True)
    np.testing.assert_array_equal(jax.jit(run)(given | whole), jax.jit(run)(given | one))


@needs_mosaic
def test_scales_by_token_and_head_of_any_size_agree():
    check(batch(lengths=(100, 64), dynamic=True), E4M3, MosaicBlocks(64, 2, 2))


@needs_mosaic
def test_no_scale_pushes_a_query_out_of_range():
    given = batch() | {"k_scale": np.full((1, 64), 2.0**30, np.float32), "sm_scale": 2.0**-33}
    check(given, E4M3, MosaicBlocks(64, 2, 1))


@needs_mosaic
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head_dim": 80}, "head_dim=80"),
        ({"page_size": 8}, "pages of 8 tokens"),
        ({"page_size": 32, "dynamic": True}, "scales by token and head in pages of 32"),
    ],
    ids=["head_dim", "page_size", "exponents"],
)
def test_what_it_cannot_do_is_refused(change, says):
    with pytest.raises(NotSupported, match=says):
        call(batch(lengths=(9,), **change), element=E4M3)


@needs_mosaic
def test_float32_queries_are_refused():
    given = batch(lengths=(9,))
    with pytest.raises(NotSupported, match="float32 queries"):
        call(given | {"q": given["q"].astype(np.float32)}, element=E4M3)


@needs_mosaic
def test_what_another_jax_makes_of_the_kernel_is_not_supported_by_version(monkeypatch):
    def changed(*_, **__):
        raise TypeError("kernel() got an unexpected keyword argument")

    monkeypatch.setattr("jax.experimental.pallas.mosaic_gpu.kernel", changed)
    with pytest.raises(NotSupported, match=rf"jax {jax.__version__} does not take this kernel.*unexpected keyword"):
        call(batch(lengths=(9,)), element=E4M3)


@needs_mosaic
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_lowers_for_hopper(dynamic):
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    given = batch(head_dim=128, kv_heads=2, dynamic=dynamic)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(functools.partial(call, element=E4M3)).trace(given).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
