"""`layer_matmul`, interpreted, against float64 NumPy within the error bound of float32 sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels import MatmulBlocks, NotSupported, layer_matmul
from pallas_kernels.fp8 import BFLOAT16, FLOAT16, FLOAT32
from pallas_kernels.layer_matmul.blocks import choose_blocks
from pallas_kernels.layer_matmul.reference import layer_matmul_reference
from tests.pallas_kernels.test_lowering import TRITON, on_gpu

pytestmark = pytest.mark.quick_compile

TYPES = (BFLOAT16, FLOAT16, FLOAT32)


def case(
    rows: int, out: int, width: int, dtype=BFLOAT16, stored=None, layers: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and weights of many magnitudes; all layers but the middle one are NaN."""
    rng = np.random.default_rng(rows + out + width)
    x = rng.standard_normal((rows, width)) * 2.0 ** rng.integers(-4, 4, (rows, 1))
    weights = np.full((layers, out, width), np.nan)
    weights[layers // 2] = rng.standard_normal((out, width)) * 2.0 ** rng.integers(-4, 4, (out, 1))
    return x.astype(dtype), weights.astype(stored or dtype)


def check(x: np.ndarray, weights: np.ndarray, **options) -> np.ndarray:
    layer = len(weights) // 2
    matmul = jax.jit(functools.partial(layer_matmul, interpret=True, **options))
    got = matmul(jnp.asarray(x), jnp.asarray(weights), jnp.int32(layer))
    want, bound = layer_matmul_reference(x, weights, layer)
    assert got.dtype == jnp.float32 and got.shape == want.shape
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()
    return np.asarray(got)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("stored", TYPES, ids=lambda d: d.name)
def test_rows_and_weights_of_any_dtypes_multiply_in_the_dtype_of_the_rows(dtype, stored):
    check(*case(5, 96, 128, dtype, stored))


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 300])
def test_any_number_of_rows_is_multiplied(rows):
    check(*case(rows, 64, 64))


@pytest.mark.parametrize(
    "out, width", [(64, 64), (64, 576), (200, 320), (1, 8), (70, 1001), (130, 2048)]
)
def test_matrices_of_any_size_are_multiplied(out, width):
    check(*case(3, out, width))


@pytest.mark.parametrize("splits, block_in", [(1, 128), (2, 64), (5, 16), (7, 64)])
def test_splits_of_channels_may_be_short_or_empty(splits, block_in):
    check(
        *case(3, 40, 328), blocks=MatmulBlocks(32, 16, block_in, warps=4, stages=3, splits=splits)
    )


def test_splits_do_not_depend_on_the_number_of_rows():
    for out, width in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (576, 576)):
        splits = {
            choose_blocks(
                rows=rows, out=out, width=width, multiplied=BFLOAT16, stored=BFLOAT16
            ).splits
            for rows in range(1, 257)
        }
        assert len(splits) == 1


@pytest.mark.parametrize(
    "out, width, splits", [(4096, 4096, 4), (6144, 4096, 2), (14336, 4096, 1), (576, 576, 2)]
)
def test_large_matrices_have_two_programs_per_multiprocessor(out, width, splits):
    blocks = choose_blocks(rows=32, out=out, width=width, multiplied=BFLOAT16, stored=BFLOAT16)
    assert blocks.splits == splits
    assert out < 4096 or 132 < out // blocks.block_out * splits <= 264


def test_a_scan_over_layers_multiplies_by_each_matrix():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    weights = (rng.standard_normal((5, 64, 64)) / 8).astype(np.float32)

    @jax.jit
    def run(x, weights):
        def body(x, layer):
            y = layer_matmul(x, weights, layer, interpret=True)
            return y, y

        return jax.lax.scan(body, x, jnp.arange(5, dtype=jnp.int32))[1]

    before = x
    for layer, got in enumerate(np.asarray(run(jnp.asarray(x), jnp.asarray(weights)))):
        want, bound = layer_matmul_reference(before, weights, layer)
        assert (np.abs(got - want) <= bound).all()
        before = got


def test_no_rows_give_an_empty_result():
    x, weights = case(1, 8, 16)
    assert layer_matmul(jnp.asarray(x[:0]), jnp.asarray(weights), 1, interpret=True).shape == (0, 8)


def test_bits_and_inconsistent_shapes_are_rejected():
    x, weights = (jnp.asarray(a) for a in case(2, 8, 16))
    with pytest.raises(NotSupported, match="weights of uint16"):
        layer_matmul(x, weights.view(jnp.uint16), 1, interpret=True)
    with pytest.raises(ValueError, match="same axis"):
        layer_matmul(x[:, :8], weights, 1, interpret=True)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("shape", [(32, 4096, 4096), (80, 28672, 8192), (2, 70, 1001)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
def test_one_cuda_kernel_is_lowered_also_for_64_bit_offsets(shape, dtype):
    given = (
        jax.ShapeDtypeStruct((7, shape[2]), dtype),
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    unchecked = [export.DisabledSafetyCheck.custom_call(TRITON)]
    with on_gpu():
        lowered = export.export(
            jax.jit(layer_matmul), platforms=["cuda"], disabled_checks=unchecked
        )(*given)
    assert lowered.mlir_module().count(f"stablehlo.custom_call @{TRITON}(") == 1
