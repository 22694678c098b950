"""Compile one kernel without a GPU: XLA compiles to PTX, then ptxas and nvdisasm read it."""

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
from benchmarks._gpu.guards import Expectations
from benchmarks._gpu.topology import Target


@dataclass(frozen=True)
class Case:
    """A kernel call to compile.

    Attributes:
      name: a unique name, with the kernel, element type and option.
      kernel: the name that `pallas_call` gives the kernel.
      call: the function, called with `pools` and `arrays` as keyword arguments.
      pools: the cache arrays, donated if `written`.
      arrays: the other arrays.
      target: the GPU.
      written: whether the kernel updates the pools.
      expectations: what the machine code may contain.
      bound: returns the static bound of a hot loop, or None if it has none.
    """

    name: str
    kernel: str
    call: Callable[..., Any]
    pools: dict[str, jax.ShapeDtypeStruct]
    arrays: dict[str, jax.ShapeDtypeStruct]
    target: Target
    written: bool = False
    expectations: Expectations = field(default_factory=Expectations)
    bound: Callable[..., Bound | None] | None = None


@dataclass(frozen=True)
class Report:
    """Resources of a compiled case, and the guards it fails."""

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
        """Blocks that fit on a multiprocessor at once.

        A lane's registers are allocated in multiples of eight.
        """
        target = self.case.target
        warp_registers = -(-self.registers // 8) * 8 * WARP
        by_registers = target.figure("registers_per_core_limit") // (warp_registers * self.warps)
        by_shared = target.figure("shared_memory_per_core") // (self.shared_bytes + 1024)
        by_threads = target.figure("threads_per_core_limit") // (WARP * self.warps)
        return min(by_registers, by_shared, by_threads, 32)


def compile_case(case: Case, keep: Path | None = None) -> Report:
    """Compile for the case's target. PTX and SASS are copied to the folder `keep`."""
    with tempfile.TemporaryDirectory() as folder:
        program = _compile(case, Path(folder))
        ptx = _find_ptx(case.kernel, Path(folder))
        entry = _entry_name(ptx.read_text(encoding="utf-8"), case.kernel)
        threads, shared_bytes = _launch_size(Path(folder), entry)
        registers, stores, loads, listing = _assemble(ptx, entry, case.target)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", f"{case.name} {case.target.name}")
            (keep / f"{name}.ptx").write_bytes(ptx.read_bytes())
            (keep / f"{name}.sass").write_text(listing, encoding="utf-8")
    kernel = sass.parse(listing, entry)
    warps = threads // WARP
    hot = kernel.hot_loops(containing=TENSOR)
    memory = program.memory_analysis()
    faults = [
        *guards.register_faults(stores, loads, case.expectations),
        *guards.code_faults(hot, case.expectations),
        *guards.memory_faults(
            program.as_text(),
            temporary_bytes=memory.temp_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes,
            pool_bytes=[pool.size * pool.dtype.itemsize for pool in case.pools.values()],
            written=case.written,
        ),
    ]
    found = [case.bound(counts, warps, case.target) for counts in hot] if case.bound else []
    bounds = [bound for bound in found if bound]
    tensor_ops = {op.split(".")[0] for op in kernel.counts() if op.startswith(TENSOR)}
    return Report(
        case,
        registers,
        stores + loads,
        shared_bytes,
        warps,
        tuple(sorted(tensor_ops)),
        max(bounds, key=lambda b: b.fraction, default=None),
        tuple(dict.fromkeys(faults)),
    )


def _compile(case: Case, folder: Path) -> jax.stages.Compiled:
    """Return XLA's program for the case's target. The PTX of its kernels is written to `folder`."""

    def on_target(arrays: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = case.target.sharding
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in arrays.items()
        }

    call = jax.jit(
        lambda pools, arrays: case.call(**pools, **arrays), donate_argnums=0 if case.written else ()
    )
    with case.target.tracing():
        lowered = call.trace(on_target(case.pools), on_target(case.arrays)).lower()
    return lowered.compile(
        compiler_options={"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"}
    )


def _find_ptx(kernel: str, folder: Path) -> Path:
    found = [
        path
        for path in sorted(folder.glob("*.ptx"))
        if _entry_name(path.read_text(encoding="utf-8"), kernel)
    ]
    assert found, f"XLA compiled no kernel {kernel!r}: does pallas_call have this name?"
    return found[0]


def _entry_name(ptx: str, kernel: str) -> str:
    """Return the kernel's name in the PTX, with a number if the name was taken; "" if absent."""
    found = re.search(rf"\.entry ({re.escape(kernel)}(?:_\d+)*)\(", ptx)
    return found[1] if found else ""


def _launch_size(folder: Path, entry: str) -> tuple[int, int]:
    """Return the threads of a block and the bytes of its shared memory."""
    for path in folder.glob("*thunk_sequence.txt"):
        found = re.search(
            rf"\b{entry} grid: .*? threads: \[(\d+), (\d+), (\d+)\] +shared_memory: (\d+)",
            path.read_text(encoding="utf-8"),
        )
        if found:
            x, y, z, shared = (int(n) for n in found.groups())
            return x * y * z, shared
    raise AssertionError(f"XLA's dump has no launch of {entry}")


def _assemble(ptx: Path, entry: str, target: Target) -> tuple[int, int, int, str]:
    """Return registers, bytes spilled, bytes reloaded, and the disassembly."""
    cubin = ptx.with_suffix(".cubin")
    log = _run("ptxas", "-v", f"-arch={target.architecture}", str(ptx), "-o", str(cubin))
    info = log.split(f"Compiling entry function '{entry}'", 1)[1]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", info)
    registers = re.search(r"Used (\d+) registers", info)
    assert spills and registers, f"ptxas reported no registers of {entry}"
    listing = _run("nvdisasm", "-c", str(cubin))
    return int(registers[1]), int(spills[1]), int(spills[2]), listing


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr
