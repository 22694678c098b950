"""The device: its XLA target config, and its copy bandwidth, the reference of all other figures."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Work


def run(session: Session, config: dict[str, Any]) -> None:
    """Record the target config and the copy bandwidth."""
    target_config(session)
    copy_bandwidth(session, config)


def target_config(session: Session) -> None:
    """Write the device's target config, which `configs/gpu/` uses to compile without a GPU."""
    with session.guarded("target config", ours=False):
        from jax._src.lib import xla_client

        topology = xla_client.get_topology_for_devices(jax.devices())
        text = str(topology.target_config)
        path = session.path.with_suffix(".target_config.txtpb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        session.row("target config", file=path.name, lines=len(text.splitlines()))


def copy_bandwidth(session: Session, config: dict[str, Any]) -> None:
    """Measure the bytes per second that a copy reads and writes.

    It changes each word, so that the compiler cannot remove it.
    """
    size = config["copy"]
    work = Work(lambda words, rest, copy: words ^ (jnp.asarray(copy, jnp.uint32) + jnp.uint32(1)))
    words = jax.jit(
        lambda: jax.random.bits(jax.random.key(0, impl="rbg"), (size // 4,), jnp.uint32)
    )()
    program = session.clock.lower(work, words, None).compile()
    timing = session.clock.time(work, program, words, None)
    rate = 2 * size / timing.median
    session.facts["copy_bytes_s"] = rate
    session.row("copy", bytes=size, us=timing.median * 1e6, gb_s=rate / 1e9, clock=timing.clock)
