"""Properties of the machine that determine results or speed."""

import functools
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags of the processor on Linux; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


def has_16bit_matmul(backend: str | None = None) -> bool:
    """Return whether 16-bit matmuls run in hardware: on accelerators, and on CPUs with AMX tiles.

    On other CPUs XLA widens both operands to float32, slowly. There, float32 matmuls on tiles that
    we widen are faster and more exact (docs/log.md).
    """
    return (backend or jax.default_backend()) != "cpu" or "amx_bf16" in cpu_flags()


def activation_dtype(weights: np.dtype, backend: str | None = None) -> np.dtype:
    """Return the type of activations and matmul operands for weights of this type."""
    return np.dtype(weights) if has_16bit_matmul(backend) else np.dtype(jnp.float32)


def cache_folder() -> Path:
    """Return the folder for compiled programs: `JFP8KV_CACHE_DIR`, or the user's cache folder."""
    import platformdirs

    given = os.environ.get("JFP8KV_CACHE_DIR")
    return Path(given or platformdirs.user_cache_dir("jfp8kv", appauthor=False))


def describe_platform() -> str:
    """Return device, processor and versions in one line, for benchmark logs."""
    import jaxlib

    device = jax.devices()[0]
    return (
        f"{device.device_kind} x{jax.device_count()} "
        f"({platform.machine()}, {os.cpu_count()} cores), python {platform.python_version()}, "
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    )
