"""Picks the implementation of paged attention, and says why.

An implementation is asked for by name, or the fastest is taken that this machine and this pool allow. It brings the function
that stores tokens, and the layout of keys it is fast with: the engine makes its pool accordingly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jfp8kv.attention import reference, xla
from jfp8kv.attention.interface import KVPool, Query
from jfp8kv.attention.pallas import PallasAttention
from jfp8kv.cache.kernel_write import KernelWrite
from jfp8kv.cache.pool import write
from jfp8kv.core.errors import NotSupported, invalid_choice
from jfp8kv.core.types import ATTENTIONS
from pallas_kernels import check_pool, paged_decode, paged_prefill
from pallas_kernels.errors import NotSupported as KernelNotSupported

Attention = Callable[..., Query]
Write = Callable[..., KVPool]
LEAST_CAPABILITY = (8, 0)


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """An implementation and the reason it was chosen: how it attends, how tokens are stored, and how keys lie in a page."""

    name: str
    attend: Attention
    why: str
    write: Write = write
    keys_transposed: bool = True


def select_backend(implementation: Any = None, pool: KVPool | None = None) -> AttentionBackend:
    """The implementation asked for, or the fastest this machine can run; on `pool` (shapes suffice) if given.

    Raises `NotSupported` when the one asked for cannot run here or on this pool, `ConfigError` for an unknown name.
    """
    if implementation == "reference":
        return AttentionBackend("reference", reference.attention, "asked for")
    if implementation == "xla":
        return AttentionBackend("xla", xla.attention, "asked for")
    if implementation == "pallas":
        return _kernels("pallas", "asked for", pool, _capability())
    if implementation == "pallas_interpret":
        return _kernels(
            "pallas_interpret", "asked for; interpreted, for tests", pool, (9, 0), interpret=True
        )
    if implementation is not None:
        raise invalid_choice("attention", implementation, ATTENTIONS)
    if jax.default_backend() == "cpu":
        return AttentionBackend("xla", xla.attention, "the fast one for cpu")
    try:
        capability = _capability()
        why = f"fused kernels for compute capability {capability[0]}.{capability[1]}"
        return _kernels("pallas", why, pool, capability)
    except NotSupported as error:
        return AttentionBackend("xla", xla.attention, str(error))


def _capability() -> tuple[int, int]:
    """The GPU's compute capability. Raises `NotSupported` for anything the kernels do not run on."""
    device = jax.devices()[0]
    found = str(getattr(device, "compute_capability", ""))
    major, _, minor = found.partition(".")
    if device.platform != "gpu" or not (major.isdigit() and minor.isdigit()):
        raise NotSupported(
            "attention='pallas': needs an NVIDIA GPU, and this machine's device is "
            f"{device.device_kind!r} ({device.platform}); use 'xla', which runs on every backend."
        )
    if (int(major), int(minor)) < LEAST_CAPABILITY:
        raise NotSupported(
            f"attention='pallas': needs compute capability 8.0, and this GPU has {found}; use 'xla'."
        )
    return int(major), int(minor)


def _kernels(
    name: str,
    why: str,
    pool: KVPool | None,
    capability: tuple[int, int],
    *,
    interpret: bool = False,
) -> AttentionBackend:
    """The GPU kernels, if they read this pool."""
    if pool is not None and (left := _refused(pool, interpret)):
        if len(left) == len(pool.layout.distinct):
            raise NotSupported(f"attention={name!r}: {next(iter(left.values()))} Use 'xla'.")
        why += "; 'xla' for layers of " + "; ".join(
            f"{kind}: {reason}" for kind, reason in left.items()
        )
    attend = PallasAttention(
        paged_decode,
        paged_prefill,
        capability=capability,
        interpret=interpret,
    )
    return AttentionBackend(name, attend, why, write=KernelWrite(interpret), keys_transposed=False)


def _refused(pool: KVPool, interpret: bool) -> dict[str, str]:
    """The kinds of layers whose pages the kernels do not read, and why."""
    refused = {}
    for kind in pool.layout.distinct:
        exponents = pool.k_exponent if kind.dynamic else None
        try:
            check_pool(
                pool.v_bits, element=kind.fmt.dtype, exponents=exponents, interpret=interpret
            )
        except KernelNotSupported as error:
            refused[str(kind)] = str(error)
    return refused
