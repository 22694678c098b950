"""What must be true of a compiled kernel. Each guard says in a few words what it found; an empty list is a pass."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks._gpu.bound import ASYNC_COPY, TENSOR

NARROW = re.compile(r"(?:LDS|LDG|LD|STG|ST)\b.*\.[US](?:8|16)\b")
SPILL = re.compile(r"(?:LDL|STL)\b")
SLOW_CONVERSION = re.compile(r"F2F(?:\.|$)")
STEP = re.compile(r"^\s*(?:ROOT )?%\S+ = (?P<made>\([^)]*\)|\S+) (?P<op>[\w-]+)\(", re.M)
ARRAY = re.compile(r"[a-z]+(?P<bits>\d+)\w*\[(?P<shape>[\d,]*)\]")
# What takes no time, and kernels: those do what they are for.
FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "custom-call")


@dataclass(frozen=True)
class Wants:
    """What a kernel is held to.

    `attends`: tensor cores and 16-byte asynchronous copies do the work of its hot loop. `narrow` is how many loads and stores
    of one or two bytes that loop may have: none of them the cache's, which moves wide, but exponents are bytes each.
    `slow_conversions` may be there where that pipe is no bottleneck. `spill_moves` is how many spilled registers the loop may
    store or reload; beside it a thread may store and reload `spilled_bytes`, once.
    """

    attends: bool = True
    narrow: int = 0
    slow_conversions: int = 0
    spill_moves: int = 0
    spilled_bytes: int = 64


def in_code(hot: list[Counter[str]], wants: Wants) -> Iterator[str]:
    """Faults in the hot loops of a kernel; several loops are each held to all of it."""
    for counts in hot:
        if (slow := _count(counts, SLOW_CONVERSION)) > wants.slow_conversions:
            yield f"{slow} conversions on the slow pipe (F2F); {wants.slow_conversions} allowed"
        if (moves := _count(counts, SPILL)) > wants.spill_moves:
            yield f"{moves} moves of spilled registers; {wants.spill_moves} allowed"
        if (narrow := _count(counts, NARROW)) > wants.narrow:
            yield f"{narrow} loads and stores of one or two bytes; {wants.narrow} allowed"
        if wants.attends and not any(op.startswith(TENSOR) for op in counts):
            yield "no tensor core instruction"
        if wants.attends and not _count(counts, ASYNC_COPY):
            yield "no asynchronous copy of 16 bytes"


def in_registers(spill_stores: int, spill_loads: int, wants: Wants) -> Iterator[str]:
    """Registers that went to memory and back, anywhere in the kernel."""
    if spill_stores + spill_loads > wants.spilled_bytes:
        yield f"spills {spill_stores} bytes, reloads {spill_loads}; {wants.spilled_bytes} allowed"


def in_memory(
    hlo: str, *, temporary_bytes: int, aliased_bytes: int, pool_bytes: list[int], written: bool
) -> Iterator[str]:
    """Faults in the program around the kernel: no other step may write as much as a pool (a copy, or a conversion of every
    element), and a pool that is written is updated in place."""
    for step in STEP.finditer(hlo[hlo.index("ENTRY ") :]):
        most = max((array for array in ARRAY.finditer(step["made"])), key=array_bytes, default=None)
        if most and step["op"] not in FREE and array_bytes(most) >= min(pool_bytes):
            yield f"writes {most[0]} beside the kernel ({step['op']})"
    if temporary_bytes >= min(pool_bytes):
        yield f"needs {temporary_bytes} bytes beside its arguments: as much as a pool"
    if written and aliased_bytes < sum(pool_bytes):
        yield f"updates {aliased_bytes} of {sum(pool_bytes)} bytes in place"


def array_bytes(array: re.Match[str]) -> int:
    """Size of an array by its type in HLO, as in `f8e4m3fn[2048,8]`."""
    return (
        math.prod(int(size) for size in array["shape"].split(",") if size) * int(array["bits"]) // 8
    )


def _count(counts: Counter[str], kind: re.Pattern[str]) -> int:
    return sum(n for op, n in counts.items() if kind.match(op))
