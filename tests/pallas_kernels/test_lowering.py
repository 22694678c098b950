"""Both attention kernels lower to Triton for CUDA, without a GPU: finds unsupported primitives."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax import export

from pallas_kernels.fp8 import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32
from pallas_kernels.testing import BLOCKS, KERNELS, Batch, call
from tests.pallas_kernels.test_attention import OPTIONS

TRITON = "__gpu$xla.gpu.triton"
CASES = {
    "plain": {},
    "float32 queries": {"q_dtype": jnp.float32, **OPTIONS["all, dynamic"]},
    "all, static": {"group": 7, **OPTIONS["all, static"]},
    "all, dynamic": {"group": 7, "head_dim": 80, "page_size": 5, **OPTIONS["all, dynamic"]},
    "shifted e4m3": {"capability": (8, 0)},
    "e5m2": {"element": E5M2, "dynamic": True},
    "bfloat16": {"element": BFLOAT16, "page_size": 16},
    "float16": {"element": FLOAT16, "page_size": 16},
    "float32": {"element": FLOAT32, "page_size": 16},
}


def on_gpu() -> contextlib.AbstractContextManager:
    """Return a context with an abstract GPU, which lowering needs from jax 0.11 on."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda"
    )
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_lower_for_cuda(kernel, case) -> None:
    batch = Batch(**{"q_dtype": jnp.bfloat16, "element": E4M3} | case)
    arguments = batch.arguments(kernel)
    static = {
        name: arguments.pop(name)
        for name in ("softcap", "sm_scale", "capability")
        if name in arguments
    }

    def run(arguments: dict) -> jax.Array:
        return call(
            kernel,
            arguments,
            element=batch.element,
            blocks=BLOCKS[kernel],
            interpret=False,
            **static,
        )

    given = {name: jnp.asarray(x) for name, x in arguments.items()}
    unchecked = [export.DisabledSafetyCheck.custom_call(TRITON)]
    with on_gpu():
        lowered = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)(given)
    assert lowered.mlir_module().count(f"stablehlo.custom_call @{TRITON}(") == 1
