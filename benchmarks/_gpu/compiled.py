"""One kernel, compiled for a GPU that need not be there: XLA's own compiler to PTX, then ptxas and nvdisasm to read it."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from benchmarks._gpu import guards, sass
from benchmarks._gpu.bound import TENSOR, WARP, Bound
from benchmarks._gpu.guards import Wants
from benchmarks._gpu.topology import Target


@dataclass(frozen=True)
class Case:
    """A call of a kernel to compile.

    `kernel` is the name that its `pallas_call` gives it. It is called with `pools`, the cache's arrays, which are given up
    (donated) where they are written, and with other `arrays`. `against` is what the hot loop is measured against, if anything.
    """

    name: str
    kernel: str
    call: Callable[..., Any]
    pools: dict[str, jax.ShapeDtypeStruct]
    arrays: dict[str, jax.ShapeDtypeStruct]
    target: Target
    written: bool = False
    wants: Wants = field(default_factory=Wants)
    against: Callable[..., Bound | None] | None = None


@dataclass(frozen=True)
class Report:
    """What the compilers made of a case, and every guard it fails."""

    case: Case
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    tensor_ops: tuple[str, ...]
    bound: Bound | None
    faults: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the kernel that fit on a multiprocessor at once; registers come to a warp in eights a lane."""
        target, warp_registers = self.case.target, -(-self.registers // 8) * 8 * WARP
        by_registers = target.figure("registers_per_core_limit") // (warp_registers * self.warps)
        by_shared = target.figure("shared_memory_per_core") // (self.shared_bytes + 1024)
        by_threads = target.figure("threads_per_core_limit") // (WARP * self.warps)
        return min(by_registers, by_shared, by_threads, 32)


def compile_case(case: Case, keep: Path | None = None) -> Report:
    """Compile for the case's target; `keep` is a folder that PTX and SASS are left in."""
    with tempfile.TemporaryDirectory() as made:
        program = _compile(case, Path(made))
        ptx = _ptx_of(case.kernel, Path(made))
        entry = _entry(ptx.read_text(encoding="utf-8"), case.kernel)
        threads, shared_bytes = _launch(Path(made), entry)
        registers, stores, loads, listing = _assemble(ptx, entry, case.target)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", f"{case.name} {case.target.name}")
            (keep / f"{name}.ptx").write_bytes(ptx.read_bytes())
            (keep / f"{name}.sass").write_text(listing, encoding="utf-8")
    kernel, warps = sass.parse(listing, entry), threads // WARP
    hot = kernel.hot(among=TENSOR)
    memory = program.memory_analysis()
    faults = [
        *guards.in_registers(stores, loads, case.wants),
        *guards.in_code(hot, case.wants),
        *guards.in_memory(
            program.as_text(),
            temporary_bytes=memory.temp_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes,
            pool_bytes=[pool.size * pool.dtype.itemsize for pool in case.pools.values()],
            written=case.written,
        ),
    ]
    bounds = [
        b for counts in hot if case.against and (b := case.against(counts, warps, case.target))
    ]
    return Report(
        case,
        registers,
        stores + loads,
        shared_bytes,
        warps,
        tuple(sorted({op.split(".")[0] for op in kernel.counts() if op.startswith(TENSOR)})),
        max(bounds, key=lambda b: b.share, default=None),
        tuple(dict.fromkeys(faults)),
    )


def _compile(case: Case, folder: Path) -> jax.stages.Compiled:
    """XLA's program for the case's target; the PTX of its kernels lies in `folder`."""
    sharding = case.target.sharding
    pools, arrays = (
        {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in some.items()
        }
        for some in (case.pools, case.arrays)
    )
    call = jax.jit(
        lambda pools, arrays: case.call(**pools, **arrays), donate_argnums=0 if case.written else ()
    )
    with case.target.tracing():
        lowered = call.trace(pools, arrays).lower()
    return lowered.compile(
        compiler_options={"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"}
    )


def _ptx_of(kernel: str, folder: Path) -> Path:
    found = [
        path
        for path in sorted(folder.glob("*.ptx"))
        if _entry(path.read_text(encoding="utf-8"), kernel)
    ]
    assert found, f"XLA made no kernel {kernel!r}: is it the name that pallas_call was given?"
    return found[0]


def _entry(ptx: str, kernel: str) -> str:
    """The kernel's name as XLA has it, with a number behind when the name was taken; empty if the kernel is not here."""
    found = re.search(rf"\.entry ({re.escape(kernel)}(?:_\d+)*)\(", ptx)
    return found[1] if found else ""


def _launch(folder: Path, entry: str) -> tuple[int, int]:
    """Threads of a block, and bytes of its shared memory."""
    for path in folder.glob("*thunk_sequence.txt"):
        found = re.search(
            rf"\b{entry} grid: .*? threads: \[(\d+), (\d+), (\d+)\] +shared_memory: (\d+)",
            path.read_text(encoding="utf-8"),
        )
        if found:
            x, y, z, shared = (int(n) for n in found.groups())
            return x * y * z, shared
    raise AssertionError(f"XLA says nothing of how it starts {entry}")


def _assemble(ptx: Path, entry: str, target: Target) -> tuple[int, int, int, str]:
    """Registers, bytes spilled, bytes reloaded, and the disassembly."""
    cubin = ptx.with_suffix(".cubin")
    log = _tool("ptxas", "-v", f"-arch={target.architecture}", str(ptx), "-o", str(cubin))
    about = log.split(f"Compiling entry function '{entry}'", 1)[1]
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", about).groups()
    registers = re.search(r"Used (\d+) registers", about)[1]
    return int(registers), int(stores), int(loads), _tool("nvdisasm", "-c", str(cubin))


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr
