"""The experimental decode kernel on Mosaic GPU (jax 0.11): interpreted, and lowered for Hopper.

The interpreter does not check layouts of registers and shared memory, nor barriers among the warps
of a program. Lowering checks layouts.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MosaicBlocks, NotSupported, paged_decode_mosaic
from pallas_kernels.fp8 import BFLOAT16, E4M3, E5M2, FLOAT16
from pallas_kernels.testing import OUTSIDE, STATIC, Batch, as_view

NEW = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not NEW, reason="the kernel needs the Mosaic GPU of jax 0.11")


def batch(*, lengths: tuple[int, ...] = (100, 0, 3), **options: Any) -> Batch:
    """Return a batch of few and long requests: a block has 64 keys."""
    same = {
        "q_dtype": jnp.bfloat16,
        "kv_heads": 1,
        "group": 4,
        "head_dim": 64,
        "page_size": 64,
        "queries": (0,) * len(lengths),
    }
    return Batch(lengths=lengths, **same | options)


def call(arguments: dict[str, Any], **options: Any) -> jax.Array:
    arguments = {name: x if name in STATIC else jnp.asarray(x) for name, x in arguments.items()}
    return paged_decode_mosaic(**as_view(arguments), **options)


def run(arguments: dict[str, Any], element: np.dtype, blocks: MosaicBlocks) -> np.ndarray:
    static = {name: arguments[name] for name in STATIC if name in arguments}
    arrays = {name: x for name, x in arguments.items() if name not in static}
    return np.asarray(
        jax.jit(functools.partial(call, element=element, blocks=blocks, interpret=True, **static))(
            arrays
        )
    )


def check(batch: Batch, *, block_k: int = 64, splits: int = 1, **options: Any) -> None:
    arguments = batch.arguments("decode", **options)
    batch.compare(
        "decode", run(arguments, batch.element, MosaicBlocks(block_k, 2, splits)), arguments
    )


@pytest.mark.skipif(NEW, reason="this jax has the Mosaic GPU of 0.11")
def test_an_older_jax_is_rejected_with_its_version():
    with pytest.raises(
        NotSupported, match=rf"needs jax >= 0.11, and this is jax {jax.__version__}"
    ):
        call(batch().arguments("decode"), element=E4M3)


@needs_mosaic
@pytest.mark.parametrize("element", [E4M3, E5M2, BFLOAT16, FLOAT16], ids=lambda e: e.name)
def test_every_element_type_agrees(element):
    check(batch(element=element))


@needs_mosaic
@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
def test_pages_smaller_and_larger_than_a_block_agree(page_size):
    check(batch(page_size=page_size))


@needs_mosaic
def test_blocks_of_two_instructions_and_splits_agree():
    check(batch(lengths=(300, 1), page_size=32), block_k=128, splits=2)


@needs_mosaic
def test_a_large_group_is_split_into_tiles():
    check(batch(group=40, lengths=(70,)))


@needs_mosaic
@pytest.mark.parametrize("head_dim", [128, 256])
def test_larger_heads_agree(head_dim):
    check(batch(head_dim=head_dim, kv_heads=2, group=1, lengths=(70,)))


@needs_mosaic
def test_tokens_outside_the_window_are_not_read():
    poisoned = batch(lengths=(150, 20))
    poisoned.poison(0, range(120))
    poisoned.page_table[0, 0] = OUTSIDE
    check(poisoned, window=np.int32(30))


@needs_mosaic
def test_all_score_options_agree_in_one_call():
    options = {"sinks": 1.0, "score_offset": 1.0, "softcap": 3.0, "sm_scale": 0.2}
    check(batch(kv_heads=2, group=3, lengths=(90, 0), static=(0.7, 1.3)), splits=2, **options)


@needs_mosaic
def test_arrays_of_all_layers_are_indexed_by_the_layer():
    given, rng = batch(lengths=(90, 2)).arguments("decode"), np.random.default_rng(2)
    layers = {name: np.float32(rng.uniform(0.5, 2, (2, 1, 64))) for name in ("k_scale", "v_scale")}
    layers |= {"sinks": np.float32(rng.standard_normal((2, 4))), "window": np.int32([3, 40])}
    one = given | {name: x[1] for name, x in layers.items()}
    layers |= {"first_row": np.int32([0, given["first_row"]]), "layer": np.int32(1)}
    blocks = MosaicBlocks(64, 2, 1)
    np.testing.assert_array_equal(run(given | layers, E4M3, blocks), run(one, E4M3, blocks))


@needs_mosaic
def test_token_head_scales_of_any_magnitude_agree():
    check(batch(lengths=(250, 64), dynamic=True, spread=20), splits=2)


@needs_mosaic
def test_no_scale_overflows_a_query():
    check(batch(static=(2.0**30, 1.0)), sm_scale=2.0**-33)


@needs_mosaic
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 80}, "head_dim=80"),
        ({"page_size": 8}, "pages of 8 tokens"),
        ({"page_size": 32, "dynamic": True}, "token-head scales in pages of 32"),
        ({"q_dtype": jnp.float32}, "float32 queries"),
    ],
    ids=["head_dim", "page_size", "exponents", "float32"],
)
def test_unsupported_sizes_and_dtypes_are_rejected(change, message):
    with pytest.raises(NotSupported, match=message):
        call(batch(lengths=(9,), **change).arguments("decode"), element=E4M3)


@needs_mosaic
def test_a_jax_with_another_api_is_rejected_with_its_version(monkeypatch):
    def changed(*_, **__):
        raise TypeError("kernel() got an unexpected keyword argument")

    monkeypatch.setattr("jax.experimental.pallas.mosaic_gpu.kernel", changed)
    # By its name: the attribute `pallas_kernels.paged_decode` is a function.
    mosaic = importlib.import_module("pallas_kernels.paged_decode.mosaic")
    monkeypatch.setattr(mosaic, "TESTED_JAX", "0.0")
    with pytest.raises(
        NotSupported,
        match=rf"jax {jax.__version__} does not support this kernel.*unexpected keyword",
    ):
        call(batch(lengths=(9,)).arguments("decode"), element=E4M3)


@needs_mosaic
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_kernel_lowers_for_hopper(dynamic):
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    given = batch(head_dim=128, kv_heads=2, dynamic=dynamic).arguments("decode")
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = (
            jax.jit(functools.partial(call, element=E4M3))
            .trace(given)
            .lower(lowering_platforms=("cuda",))
        )
    assert "mosaic_gpu" in lowered.as_text()
