"""Tune block sizes for this device, for the tables of `pallas_kernels/tuning.py`.

All combinations of the configured choices are timed, those with the fewest changes from the first
choices first. Among problems with the same key, the blocks with the smallest worst-case slowdown
against the best of each problem are chosen.
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
from pallas_kernels.paged_decode.blocks import choose_splits
from pallas_kernels.tuning import read_table, table_path

DEFAULT_CORES = 132
TOLERANCE = 2.0**-6  # relative difference of results in bfloat16, each rounded by 2**-9


def choices(options: dict[str, list[int]]) -> list[dict[str, int]]:
    """Return every combination, those that differ least from the first choices first."""
    names = list(options)
    places = itertools.product(*(range(len(options[name])) for name in names))
    ordered = sorted(places, key=lambda place: (sum(place), place))
    return [
        {name: options[name][i] for name, i in zip(names, place, strict=True)} for place in ordered
    ]


def candidates(problem: Attention, config: dict[str, Any]) -> Iterator[Any]:
    """Yield None, the kernel's default, then the configured blocks."""
    yield None
    s = problem.shape
    seen = set()
    for choice in choices(config["prefill_blocks" if problem.prefill else "decode_blocks"]):
        if problem.prefill:
            blocks: Any = PrefillBlocks(**choice)
        else:
            cores = getattr(jax.devices()[0], "core_count", DEFAULT_CORES)
            splits = choose_splits(
                s.requests * s.kv_heads, programs_per_core=choice.pop("programs"), cores=cores
            )
            splits = max(1, min(splits, cdiv(s.length, choice["block_k"])))
            blocks = DecodeBlocks(**choice, splits=splits)
        if blocks not in seen:
            seen.add(blocks)
            yield blocks


def run(session: Session, config: dict[str, Any]) -> None:
    """Add a row per problem; store the chosen blocks in `session.facts` and `session.blocks`."""
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
    for number, problem in enumerate(todo):
        name = f"{problem.shape.name}, {problem.element}"
        row_labels = {"shape": problem.shape.name, "element": problem.element}
        what = f"tuning {problem.kernel}"
        # The remaining time is divided equally among the remaining problems.
        with (
            session.limited_time(1 / (len(todo) - number)),
            session.guarded(what, **row_labels),
        ):
            if session.may_time(problem.kernel, problem.element, what, **row_labels):
                found = time_candidates(session, problem, config)
                seconds[problem.kernel, problem.tuning_key][name] = found
    device = jax.devices()[0].device_kind
    tables: dict[str, dict[str, Any]] = defaultdict(dict)
    for (kernel, key), times in seconds.items():
        if best := minimax_blocks(times):
            session.blocks[kernel, key] = best
            tables[kernel][key] = asdict(best)
    session.facts["tuned"] = {kernel: {device: table} for kernel, table in tables.items()}


def time_candidates(
    session: Session, problem: Attention, config: dict[str, Any]
) -> dict[Any, float]:
    """Return the seconds of each candidate that compiles, as far as time allows.

    None is the kernel's default. Candidates with different results are recorded as wrong.
    """
    blocks_to_try = list(candidates(problem, config))
    carry, rest = problem.arrays()
    found: dict[Any, float] = {}
    expected = None
    size = config["compilers"]
    what = f"tuning {problem.kernel}"
    for start in range(0, len(blocks_to_try), size):
        if session.left() <= 0 and found:
            break
        variants = [replace(problem, blocks=b) for b in blocks_to_try[start : start + size]]
        for variant, program in compile_all(session, variants, size).items():
            if isinstance(program, Exception):
                continue
            got = session.clock.result(program, carry, rest)
            expected = got if expected is None else expected
            if (error := relative_difference(got, expected)) < TOLERANCE:
                timing = session.clock.time(variant.work, program, carry, rest)
                found[variant.blocks] = timing.median
            else:
                session.failed = True
                reason = f"wrong by {error:.2g}"
                session.row(what, **labels(problem), skipped=reason, blocks=str(variant.blocks))
    best = min(found, key=lambda blocks: found[blocks])
    default = found.get(None)
    session.row(
        what,
        **labels(problem),
        timed=len(found),
        candidates=len(blocks_to_try),
        us=found[best] * 1e6,
        default_us=None if default is None else default * 1e6,
        blocks=str(best or "default"),
    )
    return found


def relative_difference(a: jax.Array, b: jax.Array) -> float:
    """Return the relative difference by norm. Other blocks only sum in another order."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def minimax_blocks(times: dict[str, dict[Any, float]]) -> Any:
    """Return the blocks with the smallest worst-case slowdown; None is the kernel's default.

    The slowdown is relative to the best blocks of each problem.
    """
    common = set.intersection(*(set(found) for found in times.values())) if times else set()
    best = {name: min(found.values()) for name, found in times.items()}
    worst = {
        blocks: max(found[blocks] / best[name] for name, found in times.items())
        for blocks in common
    }
    return min(worst, key=lambda blocks: (worst[blocks], blocks is not None), default=None)


def publish(tables: dict[str, Any], path: Callable[[str], Path] = table_path) -> list[Path]:
    """Merge tuned blocks into the tables of the kernels, and return the written files.

    Entries of other devices and problems are preserved.
    """
    written = []
    for kernel, devices in tables.items():
        file = path(kernel)
        table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for device, problems in devices.items():
            table[device] = table.get(device, {}) | problems
        file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        written.append(file)
    read_table.cache_clear()
    return written
