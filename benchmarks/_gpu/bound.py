"""Static upper bound of a loop's throughput, from issue slots and execution pipes alone.

Four schedulers issue one instruction per clock each; a pipe executes the 32 lanes of a warp at its
rate. The bound is that of the busiest of these, with enough warps on the multiprocessor. It ignores
latency, bank conflicts, partial waves and everything outside the loop: it is not a prediction.
"""

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks._gpu.topology import Target

TENSOR = ("HMMA", "HGMMA")
SPECIAL = re.compile(r"(?:MUFU|F2F|I2F|F2I|FRND|POPC)\b")
MEMORY = re.compile(r"(?:LDSM?|STSM?|LDG(?:STS)?|STG|LDL|STL|LD|ST|ATOM[SG]?|RED|SHFL)\b")
FLOAT = re.compile(r"(?:F(?:FMA|MUL|ADD)|H(?:FMA2|MUL2|ADD2))\b")
INTEGER_MULTIPLY = re.compile(r"(?:IMAD|IDP)\b")
LOGIC = re.compile(
    r"(?:LOP3|PLOP3|PRMT|SHF|SGXT|LEA|IADD3|VIADD|IABS|ISETP|FSETP|HSETP2|SEL|FSEL"
    r"|FMNMX|HMNMX2|VIMNMX|IMNMX|F2FP|I2FP|MOV)\b"
)
ASYNC_COPY = re.compile(r"LDGSTS\b.*\.128\b")
WARP = 32


@dataclass(frozen=True)
class Bound:
    """The largest fraction of a peak rate that a loop can reach, and the pipe that limits it."""

    fraction: float
    peak: str
    limit: str


def clocks(counts: Counter[str], warps: int, target: Target) -> dict[str, float]:
    """Return the clocks that each pipe needs for one iteration of all warps of a block."""

    def count(kind: re.Pattern[str]) -> int:
        return sum(n for op, n in counts.items() if kind.match(op))

    tensor = sum(
        n * multiply_adds(op) / _rate(op, target)
        for op, n in counts.items()
        if op.startswith(TENSOR)
    )
    return {
        "issue": counts.total() * warps / 4,
        "float": count(FLOAT) * warps / target.fma,
        "integer multiply": count(INTEGER_MULTIPLY) * warps / 2,
        "logic": count(LOGIC) * warps / 2,
        "special functions": count(SPECIAL) * warps * 2,
        "shared memory": sum(n * _beats(op) for op, n in counts.items() if MEMORY.match(op))
        * warps,
        "tensor": tensor * warps,
    }


def streaming_bound(
    counts: Counter[str], warps: int, target: Target, *, used: float = 1.0
) -> Bound | None:
    """Return the bound on the fraction of memory bandwidth: bytes copied, over the clocks needed.

    `used` is the fraction of its copies that are not masked. Padded channels are not read.
    """
    copied = sum(n for op, n in counts.items() if ASYNC_COPY.match(op)) * 16 * WARP * warps * used
    if not copied:
        return None
    limit, worst = max(clocks(counts, warps, target).items(), key=lambda pipe: pipe[1])
    bytes_s = copied / worst * target.clock_hz * target.figure("core_count")
    return Bound(bytes_s / target.figure("memory_bandwidth"), "HBM", limit)


def matmul_bound(
    counts: Counter[str], warps: int, target: Target, *, used: float = 1.0
) -> Bound | None:
    """Return the bound on the fraction of the tensor cores' peak in 16-bit floating point.

    `used` is the fraction of the products that are not padding. A float32 product takes three TF32
    products.
    """
    done = sum(
        n * multiply_adds(op) / (3 if "TF32" in op else 1)
        for op, n in counts.items()
        if op.startswith(TENSOR)
    )
    done *= warps * used
    if not done:
        return None
    limit, worst = max(clocks(counts, warps, target).items(), key=lambda pipe: pipe[1])
    return Bound(done / worst / max(target.tensor.values()), "peak", limit)


def multiply_adds(op: str) -> int:
    """Return the multiply-adds of one warp.

    HMMA.16816 computes 16 x 8 x 16; the four warps of a group share an HGMMA.64x128x16.
    """
    if group := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        m, n, k = (int(x) for x in group.groups())
        return m * n * k // 4
    return {"16816": 2048, "1688": 1024, "1684": 512}[op.split(".")[1]]


def _rate(op: str, target: Target) -> float:
    """Return the multiply-adds per clock of a multiprocessor; TF32 has half as many."""
    return target.tensor[op.split(".")[0]] / (2 if "TF32" in op else 1)


def _beats(op: str) -> int:
    """Return the clocks for which a warp's memory instruction occupies shared memory.

    Shared memory transfers 128 bytes per clock.
    """
    width = re.search(r"\.(128|64)\b", op)
    if width:
        return int(width[1]) // 32
    matrices = re.match(r"(?:LDSM|STSM)\b.*\.(\d)$", op)
    return int(matrices[1]) if matrices else 1
