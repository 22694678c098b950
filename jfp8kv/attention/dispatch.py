"""Selection of the attention backend.

A backend is requested by name. By default the fastest one that supports this machine and this pool
is selected. A backend has its own function that stores tokens and its own layout of keys, and the
engine allocates the pool accordingly.
"""

import dataclasses

import jax

from jfp8kv.attention import reference, xla
from jfp8kv.attention.interface import Attention, Write
from jfp8kv.attention.pallas import PallasAttention
from jfp8kv.cache.kernel_write import KernelWrite
from jfp8kv.cache.pool import KVPool, write
from jfp8kv.core.errors import NotSupported, invalid_choice
from jfp8kv.core.log import logger, warn_once
from jfp8kv.core.types import ATTENTIONS
from pallas_kernels import NotSupported as KernelNotSupported
from pallas_kernels import check_pool, paged_decode, paged_prefill

MIN_CAPABILITY = (8, 0)
INTERPRET_CAPABILITY = (9, 0)  # the GPU that interpreted kernels are configured for


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """An attention backend.

    Attributes:
      name: one of `core.types.ATTENTIONS`.
      attend: the attention function.
      reason: why it was selected.
      write: the function that stores new tokens.
      keys_transposed: the layout of keys that it needs (cache/layout.py).
    """

    name: str
    attend: Attention
    reason: str
    write: Write = write
    keys_transposed: bool = True


def select_backend(name: object = None, pool: KVPool | None = None) -> AttentionBackend:
    """Return the backend with this name, or the fastest one for this machine.

    Args:
      name: one of `core.types.ATTENTIONS`; None for the fastest.
      pool: the pool that it must support. Its leaves may be shapes.

    Raises `NotSupported` if the named backend does not run here or on this pool, `ConfigError` for
    an unknown name.
    """
    backend = _select(name, pool)
    logger.info("attention backend: %s (%s)", backend.name, backend.reason)
    return backend


def _select(name: object, pool: KVPool | None) -> AttentionBackend:
    if name == "reference":
        return AttentionBackend("reference", reference.attention, "requested")
    if name == "xla":
        return AttentionBackend("xla", xla.attention, "requested")
    if name == "pallas":
        return _pallas(name, "requested", pool, _capability())
    if name == "pallas_interpret":
        reason = "requested; interpreted, for tests"
        return _pallas(name, reason, pool, INTERPRET_CAPABILITY, interpret=True)
    if name is not None:
        raise invalid_choice("attention", name, ATTENTIONS)
    platform = jax.default_backend()
    if platform != "gpu":
        return AttentionBackend("xla", xla.attention, f"the fastest backend for {platform}")
    try:
        capability = _capability()
        reason = f"fused kernels for compute capability {capability[0]}.{capability[1]}"
        return _pallas("pallas", reason, pool, capability)
    except NotSupported as error:
        warn_once(f"attention falls back to XLA: {error}")
        return AttentionBackend("xla", xla.attention, str(error))


def _capability() -> tuple[int, int]:
    """Return the compute capability of the GPU. Raises `NotSupported` if it is too low."""
    device = jax.devices()[0]
    found = str(getattr(device, "compute_capability", ""))
    major, _, minor = found.partition(".")
    if device.platform != "gpu" or not (major.isdigit() and minor.isdigit()):
        raise NotSupported(
            "attention='pallas': needs an NVIDIA GPU, and this machine's device is "
            f"{device.device_kind!r} ({device.platform}); use 'xla', which runs on every backend."
        )
    if (int(major), int(minor)) < MIN_CAPABILITY:
        raise NotSupported(
            f"attention='pallas': needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} "
            f"or higher, and this GPU has {found}; use 'xla'."
        )
    return int(major), int(minor)


def _pallas(
    name: str,
    reason: str,
    pool: KVPool | None,
    capability: tuple[int, int],
    *,
    interpret: bool = False,
) -> AttentionBackend:
    """Return the kernel backend. Raises `NotSupported` if it supports no layer of `pool`."""
    unsupported = {} if pool is None else _unsupported(pool, interpret)
    if pool is not None and len(unsupported) == len(pool.layout.distinct):
        raise NotSupported(f"attention={name!r}: {next(iter(unsupported.values()))} Use 'xla'.")
    if unsupported:
        layers = "; ".join(f"{spec}: {why}" for spec, why in unsupported.items())
        reason = f"{reason}; 'xla' for layers of {layers}"
    attend = PallasAttention(
        paged_decode, paged_prefill, capability=capability, interpret=interpret
    )
    return AttentionBackend(
        name, attend, reason, write=KernelWrite(interpret), keys_transposed=False
    )


def _unsupported(pool: KVPool, interpret: bool) -> dict[str, str]:
    """Return, by spec, the reason why the kernels do not support its pages."""
    reasons = {}
    for spec in pool.layout.distinct:
        exponents = pool.k_exponent if spec.dynamic else None
        try:
            check_pool(
                pool.v_bits, element=spec.fmt.dtype, exponents=exponents, interpret=interpret
            )
        except KernelNotSupported as error:
            reasons[str(spec)] = str(error)
    return reasons
