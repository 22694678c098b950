"""Guards on compiled kernels. Each yields its faults as short messages; none means a pass."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks._gpu.bound import ASYNC_COPY, TENSOR

NARROW = re.compile(r"(?:LDS|LDG|LD|STG|ST)\b.*\.[US](?:8|16)\b")
SPILL = re.compile(r"(?:LDL|STL)\b")
SLOW_CONVERSION = re.compile(r"F2F(?:\.|$)")
OPERATION = re.compile(r"^\s*(?:ROOT )?%\S+ = (?P<result>\([^)]*\)|\S+) (?P<op>[\w-]+)\(", re.M)
ARRAY = re.compile(r"[a-z]+(?P<bits>\d+)\w*\[(?P<shape>[\d,]*)\]")
# Operations that take no time, and kernels.
FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "custom-call")


@dataclass(frozen=True)
class Expectations:
    """What the machine code of a kernel must and may contain.

    Attributes:
      attention: the hot loop must use tensor cores and 16-byte asynchronous copies.
      narrow: loads and stores of one or two bytes allowed in the hot loop. Exponents are bytes; the
        rest of the cache is moved in wide accesses.
      slow_conversions: conversions on the slow pipe allowed, where it is not the bottleneck.
      spill_moves: stores and reloads of spilled registers allowed in the hot loop.
      spilled_bytes: bytes per thread that may be stored and reloaded outside of it.
    """

    attention: bool = True
    narrow: int = 0
    slow_conversions: int = 0
    spill_moves: int = 0
    spilled_bytes: int = 64


def code_faults(hot: list[Counter[str]], allowed: Expectations) -> Iterator[str]:
    """Yield the faults in the hot loops of a kernel. Each loop is checked by itself."""
    for counts in hot:
        if (slow := _count(counts, SLOW_CONVERSION)) > allowed.slow_conversions:
            yield f"{slow} conversions on the slow pipe (F2F); {allowed.slow_conversions} allowed"
        if (moves := _count(counts, SPILL)) > allowed.spill_moves:
            yield f"{moves} moves of spilled registers; {allowed.spill_moves} allowed"
        if (narrow := _count(counts, NARROW)) > allowed.narrow:
            yield f"{narrow} loads and stores of one or two bytes; {allowed.narrow} allowed"
        if allowed.attention and not any(op.startswith(TENSOR) for op in counts):
            yield "no tensor core instruction"
        if allowed.attention and not _count(counts, ASYNC_COPY):
            yield "no asynchronous copy of 16 bytes"


def register_faults(spill_stores: int, spill_loads: int, allowed: Expectations) -> Iterator[str]:
    """Yield the faults of register spills anywhere in the kernel."""
    if spill_stores + spill_loads > allowed.spilled_bytes:
        yield f"spills {spill_stores} bytes, reloads {spill_loads}; {allowed.spilled_bytes} allowed"


def memory_faults(
    hlo: str, *, temporary_bytes: int, aliased_bytes: int, pool_bytes: list[int], written: bool
) -> Iterator[str]:
    """Yield the faults in the program around the kernel.

    No other operation may write as much as a pool (a copy, or a conversion of every element), and a
    written pool must be updated in place.
    """
    for operation in OPERATION.finditer(hlo[hlo.index("ENTRY ") :]):
        arrays = ARRAY.finditer(operation["result"])
        largest = max(arrays, key=array_bytes, default=None)
        if largest and operation["op"] not in FREE and array_bytes(largest) >= min(pool_bytes):
            yield f"writes {largest[0]} outside the kernel ({operation['op']})"
    if temporary_bytes >= min(pool_bytes):
        yield f"needs {temporary_bytes} bytes in addition to its arguments: as much as a pool"
    if written and aliased_bytes < sum(pool_bytes):
        yield f"updates {aliased_bytes} of {sum(pool_bytes)} bytes in place"


def array_bytes(array: re.Match[str]) -> int:
    """Return the size of an array from its HLO type, such as `f8e4m3fn[2048,8]`."""
    return (
        math.prod(int(size) for size in array["shape"].split(",") if size) * int(array["bits"]) // 8
    )


def _count(counts: Counter[str], kind: re.Pattern[str]) -> int:
    return sum(n for op, n in counts.items() if kind.match(op))
