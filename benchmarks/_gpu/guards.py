"""What must be true of a compiled kernel. Each guard says in a few words what it found; an empty list is a pass."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks._gpu.bound import ASYNC_COPY, TENSOR

NARROW = re.compile(r"(?:LDS|LDG|LD|STG|ST)\b.*\.[US](?:8|16)\b")
SLOW_CONVERSION = re.compile(r"F2F(?:\.|$)")
COPY = re.compile(r"= \(?(?P<dtype>[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\][^=\n]*? copy(?:-start)?\(")


@dataclass(frozen=True)
class Wants:
    """What a kernel is held to.

    `attends`: tensor cores and 16-byte asynchronous copies do the work of its hot loop. `narrow` is how many loads and stores of
    one or two bytes that loop may have: none of them the cache's, which moves wide, but exponents are bytes each.
    `slow_conversions` may be there where that pipe is no bottleneck. `spilled_bytes` is how much a thread may spill and reload:
    zero, but for what is known and waits for its remedy.
    """

    attends: bool = True
    narrow: int = 0
    slow_conversions: int = 0
    spilled_bytes: int = 0


def in_code(hot: list[Counter[str]], wants: Wants) -> Iterator[str]:
    """Faults in the hot loops of a kernel; several loops are each held to all of it."""
    for counts in hot:
        if (slow := _count(counts, SLOW_CONVERSION)) > wants.slow_conversions:
            yield f"{slow} conversions on the slow pipe (F2F); {wants.slow_conversions} allowed"
        if (narrow := _count(counts, NARROW)) > wants.narrow:
            yield f"{narrow} loads and stores of one or two bytes; {wants.narrow} allowed"
        if wants.attends and not any(op.startswith(TENSOR) for op in counts):
            yield "no tensor core instruction"
        if wants.attends and not _count(counts, ASYNC_COPY):
            yield "no asynchronous copy of 16 bytes"


def in_registers(spill_stores: int, spill_loads: int, wants: Wants) -> Iterator[str]:
    """Registers that went to memory and back."""
    if spill_stores + spill_loads > wants.spilled_bytes:
        yield f"spills {spill_stores} bytes, reloads {spill_loads}; {wants.spilled_bytes} allowed"


def in_memory(hlo: str, *, temporary_bytes: int, aliased_bytes: int, pool_bytes: list[int], written: bool) -> Iterator[str]:
    """Faults in the program around the kernel: no pool may be copied, and one that is written is updated in place."""
    for found in COPY.finditer(hlo):
        if copied_bytes(found) >= min(pool_bytes):
            yield f"copies {found['dtype']}[{found['shape']}]"
    if temporary_bytes >= min(pool_bytes):
        yield f"needs {temporary_bytes} bytes beside its arguments: as much as a pool"
    if written and aliased_bytes < sum(pool_bytes):
        yield f"updates {aliased_bytes} of {sum(pool_bytes)} bytes in place"


def copied_bytes(found: re.Match[str]) -> int:
    elements = 1
    for size in filter(None, found["shape"].split(",")):
        elements *= int(size)
    return elements * int(found["bits"]) // 8


def _count(counts: Counter[str], kind: re.Pattern[str]) -> int:
    return sum(n for op, n in counts.items() if kind.match(op))
