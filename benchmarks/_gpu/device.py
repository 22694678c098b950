"""The device itself: what XLA's compiler knows of it, and how fast it copies memory, which everything else is held against."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._gpu.session import Session
from benchmarks._gpu.timing import Work


def run(session: Session, config: dict[str, Any]) -> None:
    target_config(session)
    copy_bandwidth(session, config)


def target_config(session: Session) -> None:
    """Leave the device's target config beside the results: `configs/gpu/` takes such files to compile without a GPU."""
    with session.guarded("target config", ours=False):
        from jax._src.lib import xla_client

        topology = xla_client.get_topology_for_devices(jax.devices())
        text = str(topology.target_config)
        path = session.path.with_suffix(".target_config.txtpb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        session.row("target config", file=path.name, lines=len(text.splitlines()))


def copy_bandwidth(session: Session, config: dict[str, Any]) -> None:
    """Bytes read and written a second by a copy that changes each word a little, so that it cannot be left out."""
    size = config["copy"]
    work = Work(lambda words, rest, turn: words ^ (jnp.asarray(turn, jnp.uint32) + jnp.uint32(1)))
    words = jax.jit(
        lambda: jax.random.bits(jax.random.key(0, impl="rbg"), (size // 4,), jnp.uint32)
    )()
    taken = session.clock.time(work, session.clock.lower(work, words, None).compile(), words, None)
    session.facts["copy_bytes_s"] = rate = 2 * size / taken.median
    session.row("copy", bytes=size, us=taken.median * 1e6, gb_s=rate / 1e9, by=taken.by)
