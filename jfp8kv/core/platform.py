"""What the machine at hand is good at, as far as results or speed depend on it."""

import functools
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags on Linux; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


def multiplies_halves(backend: str | None = None) -> bool:
    """Whether matrix products of 16-bit floats run in hardware: every accelerator, and CPUs with AMX tiles.

    Elsewhere XLA:CPU widens both sides anyway, slowly (docs/log.md), and float32 on widened tiles is faster and more exact.
    """
    return (backend or jax.default_backend()) != "cpu" or "amx_bf16" in cpu_flags()


def activation_dtype(weights: np.dtype, backend: str | None = None) -> np.dtype:
    """The type activations and products are kept in for weights of this type."""
    return np.dtype(weights) if multiplies_halves(backend) else np.dtype(jnp.float32)


def cache_folder() -> Path:
    """Where compiled programs are kept: `JFP8KV_CACHE_DIR`, else the user's cache folder."""
    import platformdirs

    return Path(
        os.environ.get("JFP8KV_CACHE_DIR") or platformdirs.user_cache_dir("jfp8kv", appauthor=False)
    )


def describe() -> str:
    """Device, processor and versions in one line, for benchmark logs."""
    import jaxlib

    device = jax.devices()[0]
    return (
        f"{device.device_kind} x{jax.device_count()} ({platform.machine()}, {os.cpu_count()} cores), "
        f"python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    )
