"""Block sizes by trying: a table that the kernels read (`pallas_kernels/tuned.py`), for the device at hand.

Blocks are tried in the order of their static bound, the product of all choices, those with the fewest changes from the first
ones before the rest. For problems of one class at several lengths, the blocks win whose slowest problem, against its own best,
is fastest.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._gpu.attention import compile_all, labels
from benchmarks._gpu.problems import NONE, TENSOR, Attention, Shape
from benchmarks._gpu.session import Session
from pallas_kernels import DecodeBlocks, PrefillBlocks
from pallas_kernels.backend import cdiv
from pallas_kernels.paged_decode.blocks import splits_for
from pallas_kernels.tuned import path_of, read

USUAL_CORES = 132
ALIKE = 2.0**-6  # of results in bfloat16, each rounded by 2**-9


def choices(options: dict[str, list[int]]) -> list[dict[str, int]]:
    """Every combination, those that differ least from the first choices first."""
    names = list(options)
    places = itertools.product(*(range(len(options[name])) for name in names))
    ordered = sorted(places, key=lambda place: (sum(place), place))
    return [
        {name: options[name][i] for name, i in zip(names, place, strict=True)} for place in ordered
    ]


def candidates(one: Attention, config: dict[str, Any]) -> Iterator[Any]:
    """The kernel's own choice, then the listed ones; None is its own."""
    yield None
    s, seen = one.shape, set()
    for choice in choices(config["prefill_blocks" if one.prefill else "decode_blocks"]):
        if one.prefill:
            blocks: Any = PrefillBlocks(**choice)
        else:
            cores = getattr(jax.devices()[0], "core_count", USUAL_CORES)
            splits = splits_for(s.requests * s.kv_heads, a_core=choice.pop("programs"), cores=cores)
            blocks = DecodeBlocks(
                **choice, splits=max(1, min(splits, cdiv(s.length, choice["block_k"])))
            )
        if blocks not in seen:
            seen.add(blocks)
            yield blocks


def run(session: Session, config: dict[str, Any]) -> None:
    """Rows with the best of every problem; the table of each kernel goes to `session.facts` and to `session.blocks`."""
    todo = [
        Attention(
            shape,
            element,
            TENSOR if element != "bf16" else NONE,
            part == "prefill",
            config["rotation"],
            session.dry_run,
        )
        for part in ("decode", "prefill")
        for shape in Shape.all(config, part)
        for element in config["tuned_elements"]
    ]
    seconds: dict[tuple[str, str], dict[str, dict[Any, float]]] = defaultdict(dict)
    for place, one in enumerate(todo):
        name, what = (
            f"{one.shape.name}, {one.element}",
            {"shape": one.shape.name, "element": one.element},
        )
        # What is left is shared evenly among the problems to come.
        with (
            session.within(1 / (len(todo) - place)),
            session.guarded(f"tuning {one.kernel}", **what),
        ):
            if session.may_time(one.kernel, one.element, f"tuning {one.kernel}", **what):
                seconds[one.kernel, one.block_class][name] = tried(session, one, config)
    device, tables = jax.devices()[0].device_kind, defaultdict(dict)
    for (kernel, problem), times in seconds.items():
        if best := fairest(times):
            session.blocks[kernel, problem] = best
            tables[kernel][problem] = asdict(best)
    session.facts["tuned"] = {kernel: {device: table} for kernel, table in tables.items()}


def tried(session: Session, one: Attention, config: dict[str, Any]) -> dict[Any, float]:
    """Seconds by blocks, of those there was time for and that compile. None is what the kernel takes by itself."""
    some = list(candidates(one, config))
    (carry, rest), found, usual = one.arrays(), {}, None
    size = config["compilers"]
    for part in (some[i : i + size] for i in range(0, len(some), size)):
        if session.left() <= 0 and found:
            break
        programs = compile_all(session, [replace(one, blocks=blocks) for blocks in part], size)
        for variant, program in programs.items():
            if isinstance(program, Exception):
                continue
            got = session.clock.result(program, carry, rest)
            usual = got if usual is None else usual
            if (error := distance(got, usual)) < ALIKE:
                found[variant.blocks] = session.clock.time(
                    variant.work, program, carry, rest
                ).median
            else:
                session.failed = True
                session.row(
                    f"tuning {one.kernel}",
                    **labels(one),
                    skipped=f"wrong by {error:.2g}",
                    blocks=str(variant.blocks),
                )
    best, own = min(found, key=lambda blocks: found[blocks]), found.get(None)
    session.row(
        f"tuning {one.kernel}", **labels(one), tried=len(found), of=len(some),
        us=found[best] * 1e6, own_us=None if own is None else own * 1e6, blocks=str(best or "the kernel's own"),
    )  # fmt: skip
    return found


def distance(a: jax.Array, b: jax.Array) -> float:
    """How far results are apart, by their norm: other blocks sum in another order, and no more."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def fairest(times: dict[str, dict[Any, float]]) -> Any:
    """The blocks whose worst time, as a multiple of each problem's best, is least; None is the kernel's own choice."""
    common = set.intersection(*(set(found) for found in times.values())) if times else set()
    best = {name: min(found.values()) for name, found in times.items()}
    worst = {
        blocks: max(found[blocks] / best[name] for name, found in times.items())
        for blocks in common
    }
    return min(worst, key=lambda blocks: (worst[blocks], blocks is not None), default=None)


def publish(tables: dict[str, Any], path: Callable[[str], Path] = path_of) -> list[Path]:
    """Put what was found into the tables that the kernels read; what they have of other devices and classes stays."""
    written = []
    for kernel, devices in tables.items():
        metadata = path(kernel)
        table = json.loads(metadata.read_text(encoding="utf-8")) if metadata.exists() else {}
        for device, problems in devices.items():
            table[device] = table.get(device, {}) | problems
        metadata.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        written.append(metadata)
    read.cache_clear()
    return written
